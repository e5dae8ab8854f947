//! What the program says to other processes. The only folder that opens sockets.

pub mod local_socket;
