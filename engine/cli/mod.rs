//! The commands of the program, one file each. A command parses its words, calls a floor below, and says how it ended.

pub mod bench;
mod bench_ceilings;
mod bench_decode;
mod bench_durability;
mod bench_ops;
mod bench_train;
mod chat;
pub mod doctor;
pub mod generate;
mod live;
mod output;
pub mod params;
mod peak_memory;
mod plot;
mod resume;
mod run;
mod runs;
mod sandboxed;
mod store;
mod table;
mod times;
mod types;
mod units;

use crate::error::{Error, Result};
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Lua workflows that pretrain, fine-tune and serve Qwen2.5 models.
#[derive(Parser)]
#[command(name = "perilune", version, disable_help_subcommand = true)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Resume(resume::Resume),
    Pause(live::Pause),
    Continue(live::Continue),
    Stop(live::Stop),
    Checkpoint(live::Checkpoint),
    Set(live::Set),
    Reload(live::Reload),
    Runs(runs::Runs),
    Sandboxed(sandboxed::Sandboxed),
    Store(store::Store),
    Types(types::Types),
    Bench(bench::BenchArgs),
    Doctor(doctor::DoctorArgs),
    Chat(chat::ChatArgs),
    Generate(generate::GenerateArgs),
    Params(params::ParamsArgs),
}

/// The whole program, from its words to its exit code: 0 for success, 1 for what the user can mend, 130 after Ctrl-C.
pub fn main() -> ExitCode {
    let program = match Program::try_parse() {
        Ok(program) => program,
        Err(error) => {
            let is_help = !error.use_stderr();
            let _ = error.print();
            return if is_help { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
    };
    // `doctor` shows these among all else that it finds.
    let is_doctor = matches!(program.command, Command::Doctor(_));
    if let Some(fault) = doctor::environment_fault(|name| std::env::var(name).ok()).filter(|_| !is_doctor) {
        eprintln!("error: {fault}");
        return ExitCode::FAILURE;
    }
    let result: Result<()> = match program.command {
        Command::Run(command) => command.run(),
        Command::Resume(command) => command.run(),
        Command::Pause(command) => command.run(),
        Command::Continue(command) => command.run(),
        Command::Stop(command) => command.run(),
        Command::Checkpoint(command) => command.run(),
        Command::Set(command) => command.run(),
        Command::Reload(command) => command.run(),
        Command::Runs(command) => command.run(),
        Command::Sandboxed(command) => command.run(),
        Command::Store(command) => command.run(),
        Command::Types(command) => command.run(),
        Command::Bench(args) => bench::bench(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Chat(args) => chat::chat(args),
        Command::Generate(args) => generate::generate(args),
        Command::Params(args) => params::params(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Interrupted) => ExitCode::from(crate::host::interrupt::EXIT_CODE),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
