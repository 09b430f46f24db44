//! Installs or finds what building and testing needs, and says what it took.

use std::{path::Path, process::Command};

use anyhow::{Result, bail};

use crate::{ebpf::Toolchain, run};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum For {
    Building,
    /// Demo and benchmark: in a network namespace of their own.
    Running,
    /// All of that, and virtual machines.
    Testing,
}

/// Newest bpf-linker that finds LLVM in Debian's compiler.
const BPF_LINKER: &str = "0.10.0";
/// A compiler with a prebuilt `core` for BPF, and its clippy.
const COMPILER: [&str; 3] = ["rustc-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];
/// For network namespaces.
const RUNNING: [&str; 1] = ["iproute2"];
/// For virtual machines; at the end for another clock, and what the benchmark compares with.
const TESTING: [&str; 13] = [
    "curl",
    "g++",
    "openssl",
    "python3",
    "qemu-system-x86",
    "busybox-static",
    "cpio",
    "xz-utils",
    "zstd",
    "kmod",
    "faketime",
    "nftables",
    "xdp-tools",
];

pub fn run(purpose: For) -> Result<()> {
    if Toolchain::find().is_err() {
        install(&COMPILER)?;
    }
    let toolchain = Toolchain::find()?;
    println!("setup: kernel object by {}", toolchain.describe());
    if toolchain == Toolchain::Debian && purpose == For::Testing {
        install(&COMPILER)?;
    }
    linker()?;
    if purpose != For::Building {
        install(&RUNNING)?;
    }
    if purpose == For::Testing {
        install(&TESTING)?;
        // Whose packages have several names, and are often there from elsewhere.
        for (program, arguments, packages) in
            [("npm", ["--version", ""], &["nodejs", "npm"][..]), ("python3", ["-m", "pip"], &["python3-pip"])]
        {
            if !run::works(Command::new(program).args(arguments.iter().filter(|a| !a.is_empty()))) {
                install(packages)?;
            }
        }
        components()?;
    }
    Ok(())
}

/// Installs what is missing of some Debian packages.
fn install(packages: &[&str]) -> Result<()> {
    let is_installed = |package: &&&str| {
        let mut query = Command::new("dpkg-query");
        query.args(["--show", "--showformat=${db:Status-Status}", package]);
        run::output(query.stderr(std::process::Stdio::null())).is_ok_and(|status| status == "installed")
    };
    let missing: Vec<&str> = packages.iter().filter(|p| !is_installed(p)).copied().collect();
    if missing.is_empty() {
        println!("setup: found {}", packages.join(", "));
        return Ok(());
    }
    let by_hand = format!("apt-get install --no-install-recommends {}", missing.join(" "));
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("not a Debian system: install what these packages hold: {}", missing.join(", "));
    }
    if !run::is_root() {
        bail!("run `{by_hand}` as root, or this command");
    }
    println!("setup: {by_hand}");
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "-y", "-o", "Acquire::Retries=3"])
            .args(arguments);
        run::must(&mut command)
    };
    apt(&["update"])?;
    let arguments: Vec<&str> = ["install", "--no-install-recommends"].into_iter().chain(missing).collect();
    apt(&arguments)
}

fn linker() -> Result<()> {
    if run::works(Command::new("bpf-linker").arg("--version")) {
        println!("setup: found bpf-linker");
        return Ok(());
    }
    println!("setup: cargo install bpf-linker --version {BPF_LINKER}");
    run::must(Command::new("cargo").args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked", "--quiet"]))
}

/// Of the compiler for the host.
fn components() -> Result<()> {
    for (component, probe) in [("rustfmt", "fmt"), ("clippy", "clippy")] {
        if !run::works(Command::new("cargo").args([probe, "--version"])) {
            println!("setup: rustup component add {component}");
            run::must(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}
