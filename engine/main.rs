//! The `perilune` binary: hands its arguments to the commands of `cli`.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    perilune::cli::main()
}
