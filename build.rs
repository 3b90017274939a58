//! Compiles what is not Rust: the C++ shim (feature `torch`) and, where nvcc is found, the CUDA kernels.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result, ensure};

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "torch")]
    compile_shim()?;
    compile_device_functions();
    embed_kernels()
}

/// The device's functions for the host: those that lay weights out, and every kernel for the tests. Nothing but the tests
/// refers to these, so no library contains them.
fn compile_device_functions() {
    for (source, name) in [
        ("cuda/host.cpp", "infold_device_layouts"),
        ("cuda/host_pairs.cpp", "infold_device_pairs"),
        ("cuda/simulate.cpp", "infold_simulation"),
    ] {
        cc::Build::new()
            .cpp(true)
            .cpp_link_stdlib(None)
            .std("c++17")
            .flag("-Wno-unknown-pragmas")
            .flag("-fno-exceptions")
            .flag("-fno-rtti")
            .file(source)
            .compile(name);
    }
}

#[cfg(feature = "torch")]
fn compile_shim() -> Result<()> {
    println!("cargo:rerun-if-changed=csrc");
    let libraries = env::var("DEP_TCH_LIBTORCH_LIB").context("torch-sys did not say where libtorch is")?;
    let include = Path::new(&libraries).with_file_name("include");
    let sources = [
        "autocast.cpp",
        "autograd.cpp",
        "frequency.cpp",
        "frequency_conv.cpp",
        "host.cpp",
        "kernels.cpp",
        "log8.cpp",
        "meta.cpp",
        "register.cpp",
        "sparse_frequency.cpp",
        "sparse_frequency_cuda.cpp",
        "spline.cpp",
        "tier.cpp",
    ];
    cxx_build::bridge("src/bridge.rs")
        .files(sources.map(|name| Path::new("csrc").join(name)))
        // As system headers, so that PyTorch's own warnings stay out of ours.
        .flag("-isystem")
        .flag(include.display().to_string())
        .flag("-isystem")
        .flag(include.join("torch/csrc/api/include").display().to_string())
        .std("c++17")
        // Without it at::parallel_for is silently serial.
        .flag("-fopenmp")
        .flag("-D_GLIBCXX_USE_CXX11_ABI=1")
        .cargo_metadata(false)
        .compile("infold_shim");
    // Whole, because nothing refers to the static objects that register the operators.
    println!("cargo:rustc-link-search=native={}", env::var("OUT_DIR")?);
    println!("cargo:rustc-link-lib=static:+whole-archive=infold_shim");
    println!("cargo:rustc-link-lib=dylib=stdc++");
    println!("cargo:rustc-link-lib=dylib=gomp");
    println!("cargo:rustc-link-arg=-Wl,--as-needed");
    Ok(())
}

/// Where nvcc may be: named, on the PATH, or beside the torch package in a virtual environment.
fn find_nvcc() -> Option<PathBuf> {
    // Not PATH: it differs between shells, and the C++ shim would be compiled anew for each.
    for name in ["NVCC", "LIBTORCH", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let named = env::var_os("NVCC").map(PathBuf::from);
    let home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let torch = env::var_os("LIBTORCH").and_then(|torch| fs::canonicalize(torch).ok());
    let beside_torch = torch.map(|torch| torch.with_file_name("nvidia/cu13/bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|folder| folder.join("nvcc")).collect::<Vec<_>>();
    named.into_iter().chain(home).chain(beside_torch).chain(on_path).find(|candidate| candidate.is_file())
}

/// Compiles each kernel file to a fatbin and writes `fatbins.rs`, which includes them. Without nvcc the list is empty.
fn embed_kernels() -> Result<()> {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=INFOLD_CUDA_ARCHS");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let architectures = env::var("INFOLD_CUDA_ARCHS").unwrap_or_else(|_| "80 90a".into());
    let architectures: Vec<&str> = architectures.split_whitespace().collect();
    let mut entries = String::new();
    let mut names = Vec::new();
    if let Some(nvcc) = find_nvcc() {
        for source in kernel_files()? {
            let fatbin = compile_kernel(&nvcc, &source, &architectures, &out)?;
            let name = source.file_stem().context("a kernel file without a name")?.to_string_lossy();
            entries += &format!("Fatbin {{ name: {name:?}, bytes: &Aligned(*include_bytes!({fatbin:?})).0 }},\n");
        }
        names = architectures.iter().map(|arch| format!("sm_{arch}")).collect();
        names.push("compute_80".into());
    }
    let list = format!(
        "// Kept although the CPU code reads only their sizes.\n#[used]\nstatic FATBINS: &[Fatbin] = &[\n{entries}];\nconst ARCHITECTURES: &[&str] = &{names:?};\n"
    );
    fs::write(out.join("fatbins.rs"), list)?;
    Ok(())
}

fn kernel_files() -> Result<Vec<PathBuf>> {
    let mut files = device_files()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "cu"));
    Ok(files)
}

fn device_files() -> Result<Vec<PathBuf>> {
    let mut files = fs::read_dir("cuda")?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

/// One nvcc run, skipped where a fatbin of the same source, compiler and architectures is there already.
fn compile_kernel(nvcc: &Path, source: &Path, architectures: &[&str], out: &Path) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    // Any of the headers may be in it.
    for file in device_files()? {
        let extension = file.extension().unwrap_or_default();
        if extension != "cu" || file == source {
            fs::read(file)?.hash(&mut hasher);
        }
    }
    (architectures, nvcc).hash(&mut hasher);
    let stem = source.file_stem().context("a kernel file without a name")?.to_string_lossy();
    let fatbin = out.join(format!("{stem}-{:016x}.fatbin", hasher.finish()));
    if fatbin.is_file() {
        return Ok(fatbin);
    }
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-O3", "-std=c++17", "-Xptxas", "-v"]);
    for arch in architectures {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    // PTX of the oldest architecture serves every later one that has no code of its own.
    command.arg("-gencode=arch=compute_80,code=compute_80").arg("-o").arg(&fatbin).arg(source);
    let run = command.output().with_context(|| format!("cannot run {}", nvcc.display()))?;
    let log = String::from_utf8_lossy(&run.stderr);
    ensure!(run.status.success(), "nvcc failed on {}:\n{log}", source.display());
    check_code(&log).with_context(|| format!("{}:\n{log}", source.display()))?;
    fs::write(fatbin.with_extension("log"), log.as_bytes())?;
    Ok(fatbin)
}

/// No kernel may keep registers in memory (ptxas says what each has on the stack and what it spills), nor wait for each of
/// its asynchronous products.
fn check_code(log: &str) -> Result<()> {
    ensure!(!log.contains("are serialized"), "a kernel's products do not overlap");
    for line in log.lines().filter(|line| line.contains("bytes stack frame")) {
        let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
        ensure!(numbers.all(|number| number == "0"), "a kernel spills: {}", line.trim());
    }
    Ok(())
}
