//! Runs the root tests on another kernel: a Debian kernel, an initramfs with the programs and their libraries, QEMU.
//!
//! The kernel's package is unpacked, never installed. The machine has no disk and no network; it prints its result and ends.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    programs::Programs,
    run,
    test::{Outcome, ROOT},
};

/// Kernels that authd supports, besides the one that it is developed on, and how many machines share each one's tests, for
/// shares of one length: on the oldest, loading the programs takes longest.
pub const KERNELS: [(&str, usize); 2] = [("6.1", 3), ("6.12", 2)];
/// How many machines run at a time. Each keeps a processor busy while its tests do not wait.
const AT_ONCE: usize = 3;
/// Modules of the tests, and (by modules.dep) what they need.
const MODULES: [&str; 7] = ["veth", "inet_diag", "tcp_diag", "udp_diag", "unix_diag", "dummy", "bridge"];
/// A machine that runs for longer hangs.
const LONGEST: Duration = Duration::from_secs(4200);
/// Both processors of a machine take turns on one thread. On a thread each, one now and then runs an instruction that the
/// other one patched long ago, and the kernel panics ("Oops: int3"): QEMU's fault, not the kernel's.
const ACCELERATION: &str = "tcg,thread=single";
/// All that can be emulated, but for a fifth level of page tables, which makes each walk through them longer, and for what
/// makes Linux 6.1 copy memory with `rep movs`: QEMU takes a turn for each octet or word of it, and the verifier copies a lot.
const PROCESSOR: &str = "max,la57=off,erms=off,vendor=GenuineIntel,family=15,model=6";
/// An emulated processor speculates on nothing, but takes long for the indirect jumps that are to keep it from doing so.
/// Whose memory the kernel's own objects are is of no interest here, and costs something for each of the verifier's.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 quiet panic=-1 lsm=lockdown,yama,bpf mitigations=off cgroup.memory=nokmem";

/// One of the machines with a kernel, and its share of the tests.
#[derive(Clone, Copy)]
struct Machine {
    kernel: &'static str,
    share: usize,
    of: usize,
}

impl Machine {
    fn name(self) -> String {
        let Self { kernel, share, of } = self;
        if of == 1 { kernel.to_owned() } else { format!("{kernel} {}/{of}", share + 1) }
    }
}

/// Runs the tests on every kernel. Returns what each machine is called, too.
pub fn run_all(workspace: &Path, programs: &Programs, filter: Option<&str>) -> Vec<(String, Result<Outcome>)> {
    let mut machines = Vec::new();
    let mut done = Vec::new();
    for (kernel, of) in KERNELS {
        match directory_of(workspace, kernel).and_then(|directory| Image::fetch(&directory, kernel)) {
            Ok(image) => machines.extend((0..of).map(|share| (Machine { kernel, share, of }, image.clone()))),
            Err(error) => done.push((kernel.to_owned(), Err(error))),
        }
    }
    done.extend(run::side_by_side(AT_ONCE, &machines, |(machine, image)| {
        (machine.name(), run(workspace, *machine, image, programs, filter))
    }));
    done
}

fn directory_of(workspace: &Path, name: &str) -> Result<PathBuf> {
    let directory = run::target_directory(workspace).join("vm").join(name.replace([' ', '/'], "-"));
    fs::create_dir_all(&directory)?;
    Ok(directory)
}

fn run(
    workspace: &Path,
    machine: Machine,
    image: &Image,
    programs: &Programs,
    filter: Option<&str>,
) -> Result<Outcome> {
    let kernel = &machine.name();
    println!("vm {kernel}: {}", image.release);
    let initramfs = initramfs(&directory_of(workspace, kernel)?, machine, image, programs, filter)?;
    let mut outcome = Outcome::new(&format!("vm {kernel}"));
    let Some(code) = boot(image, &initramfs, kernel, &mut outcome)? else {
        bail!("the machine ended before its tests did");
    };
    if code != 0 && outcome.failed.is_empty() {
        outcome.failed.push(format!("vm {kernel}: the tests ended with {code}"));
    }
    Ok(outcome)
}

#[derive(Clone)]
struct Image {
    kernel: PathBuf,
    modules: PathBuf,
    release: String,
}

impl Image {
    /// Downloads the newest package of a series, if it is not there yet.
    fn fetch(directory: &Path, series: &str) -> Result<Self> {
        let unpacked = directory.join("package");
        if !unpacked.join("boot").is_dir() {
            let search = format!("^linux-image-{}.*-cloud-amd64$", series.replace('.', "[.]"));
            let names = run::output(Command::new("apt-cache").args(["search", "--names-only", &search]))?;
            let prefix = format!("linux-image-{series}.");
            let dashed = format!("linux-image-{series}-");
            let mut names: Vec<&str> = names
                .lines()
                .filter_map(|line| line.split(' ').next())
                .filter(|name| name.starts_with(&prefix) || name.starts_with(&dashed))
                .collect();
            names.sort_by_key(|name| numbers(name));
            let name = names.last().with_context(|| format!("no package of kernel {series}: run `apt-get update`"))?;
            println!("vm {series}: fetching {name}");
            let options = ["-qq", "-o", "Acquire::Retries=3", "-o", "APT::Sandbox::User=root", "download", name];
            run::must(Command::new("apt-get").current_dir(directory).args(options))?;
            let package = fs::read_dir(directory)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| path.extension().is_some_and(|e| e == "deb"))
                .context("apt-get left a package")?;
            let partial = directory.join("package.partial");
            let _ = fs::remove_dir_all(&partial);
            run::must(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&partial))?;
            fs::rename(&partial, &unpacked)?;
            fs::remove_file(package)?;
        }
        let kernel = fs::read_dir(unpacked.join("boot"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
            .context("the package has a kernel")?;
        let release =
            kernel.file_name().unwrap_or_default().to_string_lossy().trim_start_matches("vmlinuz-").to_owned();
        let modules = unpacked.join("lib/modules").join(&release);
        let modules = if modules.is_dir() { modules } else { unpacked.join("usr/lib/modules").join(&release) };
        Ok(Self { kernel, modules, release })
    }

    /// Files of the modules, dependencies first.
    fn modules(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let all = run::output(Command::new("find").arg(&self.modules).args(["-name", "*.ko*"]))?;
        let path_of = |name: &str| {
            all.lines().map(Path::new).find(|path| {
                let file = path.file_name().unwrap_or_default().to_string_lossy();
                file.split(".ko").next().is_some_and(|stem| stem.replace('-', "_") == name.replace('-', "_"))
            })
        };
        let mut seen = BTreeSet::new();
        let mut todo: Vec<(String, bool)> = MODULES.iter().map(|m| ((*m).to_owned(), false)).collect();
        while let Some((name, has_all)) = todo.pop() {
            // Built in, in this kernel.
            let Some(path) = path_of(&name) else { continue };
            if has_all {
                files.push(path.to_owned());
            } else if seen.insert(name.clone()) {
                let depends = run::output(Command::new("modinfo").args(["-F", "depends"]).arg(path))?;
                todo.push((name, true));
                todo.extend(depends.trim().split(',').filter(|d| !d.is_empty()).map(|d| (d.to_owned(), false)));
            }
        }
        Ok(files)
    }
}

/// A file system in memory: busybox, the programs, the libraries that they name.
fn initramfs(
    directory: &Path,
    machine: Machine,
    image: &Image,
    programs: &Programs,
    filter: Option<&str>,
) -> Result<PathBuf> {
    let Machine { share, of, .. } = machine;
    let root = directory.join("root");
    let _ = fs::remove_dir_all(&root);
    for path in ["bin", "sbin", "proc", "sys", "dev", "tmp", "run", "var/lib", "etc", "modules", "lib64"] {
        fs::create_dir_all(root.join(path))?;
    }
    copy(Path::new("/bin/busybox"), &root.join("bin/busybox"))?;
    for applet in ["sh", "mount", "mkdir", "insmod", "poweroff", "cat", "echo", "ls", "dmesg", "sleep", "mdev", "grep"]
    {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    let ip =
        ["/usr/sbin/ip", "/sbin/ip", "/usr/bin/ip", "/bin/ip"].map(Path::new).into_iter().find(|path| path.exists());
    let ip = ip.context("iproute2 is installed")?;
    for (program, name) in [
        (programs.authd.as_path(), "authd"),
        (&programs.probe, "authd-probe"),
        (programs.suite(ROOT)?.program(), "authd-root-tests"),
        (ip, "ip"),
    ] {
        strip(program, &root.join("bin").join(name))?;
        for library in libraries(program)? {
            let inside = root.join(library.strip_prefix("/")?);
            if !inside.exists() {
                fs::create_dir_all(inside.parent().context("a library lies somewhere")?)?;
                copy(&library, &inside)?;
            }
        }
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
    let mut loads = String::new();
    for (index, module) in image.modules()?.iter().enumerate() {
        let inside = format!("modules/{index}.ko");
        let plain = match module.extension().and_then(|e| e.to_str()) {
            Some("xz") => run_bytes(Command::new("xz").args(["-dc"]).arg(module))?,
            Some("zst") => run_bytes(Command::new("zstd").args(["-dcq"]).arg(module))?,
            _ => fs::read(module)?,
        };
        fs::write(root.join(&inside), plain)?;
        loads += &format!("insmod /{inside}\n");
    }
    let filter = filter.unwrap_or_default();
    let init = format!(
        "#!/bin/sh
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
echo 1 > /proc/sys/kernel/printk
{loads}ip link set lo up
export AUTHD_BIN=/bin/authd AUTHD_PROBE=/bin/authd-probe AUTHD_EMULATED=1 AUTHD_SHARE={share}/{of} RUST_BACKTRACE=1
authd-root-tests --color never {filter} 2>&1
echo XTASK-VM-EXIT $?
poweroff -f
"
    );
    fs::write(root.join("init"), init)?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    let archive = directory.join("initramfs.cpio");
    let pack = "find . -print0 | cpio --null --create --format=newc --quiet";
    let packed = run_bytes(Command::new("sh").current_dir(&root).args(["-c", pack]))?;
    fs::write(&archive, packed)?;
    Ok(archive)
}

/// The exit code of the tests; `None` if the machine ended without one.
fn boot(image: &Image, initramfs: &Path, kernel: &str, outcome: &mut Outcome) -> Result<Option<i32>> {
    let mut child = Command::new("timeout")
        .arg(LONGEST.as_secs().to_string())
        .args(["qemu-system-x86_64", "-accel", ACCELERATION, "-cpu", PROCESSOR, "-smp", "2", "-m", "2048"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", KERNEL_ARGUMENTS, "-nographic", "-no-reboot", "-nic", "none"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting qemu-system-x86_64")?;
    let mut code = None;
    for line in BufReader::new(child.stdout.take().context("the pipe was asked for")?).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end_matches('\r').to_owned();
        println!("  {kernel} | {line}");
        outcome.line(&line);
        if let Some(rest) = line.trim().strip_prefix("XTASK-VM-EXIT ") {
            code = rest.trim().parse().ok();
        }
    }
    child.wait()?;
    Ok(code)
}

/// Numbers in a package's name, for comparing versions.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// Libraries that a program is linked with, by their paths here.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = run::output(Command::new("ldd").arg(program))?;
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(listed.lines().filter_map(path).collect())
}

fn strip(from: &Path, to: &Path) -> Result<()> {
    if !run::works(Command::new("strip").arg("-o").arg(to).arg(from)) {
        copy(from, to)?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    Ok(())
}

fn run_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("starting {}", run::show(command)))?;
    if !output.status.success() {
        bail!("{} failed: {}", run::show(command), output.status);
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(numbers("linux-image-6.1.0-56-cloud-amd64") > numbers("linux-image-6.1.0-9-cloud-amd64"));
    }
}
