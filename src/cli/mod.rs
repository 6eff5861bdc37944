//! The command line: one file per subcommand.

pub mod assemble;
pub mod serve;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Serves Llama-class models over the OpenAI API.
#[derive(Parser)]
#[command(name = "candela", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Load a model and serve it.
    Serve(serve::ServeArgs),
    /// Fetch a model and verify it, without serving it.
    Pull(serve::ModelArgs),
}

/// Runs the command that the process was started with.
pub fn run() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(args) => serve::serve(&args),
        Command::Pull(args) => serve::pull(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
