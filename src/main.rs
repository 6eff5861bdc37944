use std::process::ExitCode;

fn main() -> ExitCode {
    candela::cli::run()
}
