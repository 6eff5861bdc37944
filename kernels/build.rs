//! Compiles the kernels, where the `cuda` feature is on: a fat binary a file, which the library
//! includes. Without the feature there is nothing to do.

use std::{env, error::Error, fmt::Write, fs, path::PathBuf, process::Command};

/// Machine code for these compute capabilities, and PTX of the first for newer ones.
const CAPABILITIES: [&str; 4] = ["80", "86", "89", "90"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=NVCC");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    let nvcc = env::var("NVCC").unwrap_or_else(|_| "nvcc".into());
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut files: Vec<PathBuf> = fs::read_dir("kernels")?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_, Box<dyn Error>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "cu"));
    files.sort();
    let mut list = String::from("const FATBINS: &[(&str, &[u8])] = &[\n");
    // As many at a time as cargo allows.
    let most = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
    let mut running = Vec::new();
    for file in files {
        let name =
            file.file_stem().and_then(|name| name.to_str()).ok_or("a kernel without a name")?;
        let to = out.join(format!("{name}.fatbin"));
        writeln!(list, "    ({name:?}, include_bytes!({:?})),", to.display().to_string())?;
        let mut command = Command::new(&nvcc);
        command.args(["-std=c++17", "-O3", "-fatbin", "-o"]).arg(&to).arg(&file);
        for capability in CAPABILITIES {
            command.arg("-gencode");
            command.arg(format!("arch=compute_{capability},code=sm_{capability}"));
        }
        let first = CAPABILITIES[0];
        command.arg("-gencode").arg(format!("arch=compute_{first},code=compute_{first}"));
        let started = command.spawn().map_err(|error| {
            format!("{nvcc}: {error}; `eval \"$(kernels/setup)\"` makes one where there is no CUDA")
        })?;
        running.push((file, started));
        if running.len() >= most {
            let (file, mut first) = running.remove(0);
            finish(&file, first.wait()?)?;
        }
    }
    for (file, mut process) in running {
        finish(&file, process.wait()?)?;
    }
    list.push_str("];\n");
    fs::write(out.join("kernels.rs"), list)?;
    Ok(())
}

fn finish(file: &std::path::Path, status: std::process::ExitStatus) -> Result<(), Box<dyn Error>> {
    if status.success() {
        return Ok(());
    }
    Err(format!("{} does not compile: {status}", file.display()).into())
}
