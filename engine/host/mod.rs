//! Lua: the virtual machine, the face of the engine in it, and the run of a workflow. The only folder that names mlua.

pub mod lua_version;
