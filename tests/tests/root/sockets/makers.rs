//! In which cgroup a socket was made, as its other end learns.

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::MetadataExt,
    thread,
};

use anyhow::{Result, ensure};
use authd::dataplane::attestation;
use authd_tests::{probe::Running, sandbox::Sandbox};
use nix::sched::{CloneFlags, setns};

use crate::Verdict;

/// As the loopback listener of the gateway asks: of IPv4, IPv6 and mapped addresses.
pub fn makers() -> Result<Verdict> {
    let sandbox = Sandbox::new()?;
    let cgroup = sandbox.cgroup.child("/maker")?;
    let number = fs::metadata(&cgroup)?.ino();
    let (netns, path) = (sandbox.netns.path().to_owned(), cgroup.clone());
    // A thread that entered another namespace is no use for anything else.
    let inside = thread::spawn(move || -> Result<()> {
        setns(File::open(&netns)?, CloneFlags::CLONE_NEWNET)?;
        for (listens, called) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "[::1]"), ("[::]:0", "127.0.0.1")] {
            let listener = TcpListener::bind(listens)?;
            let to = format!("{called}:{}", listener.local_addr()?.port());
            let arguments = ["--uid", "40005", "hold-tcp", &to];
            let answering = thread::spawn(move || -> Result<_> {
                let (mut stream, _) = listener.accept()?;
                let owner = attestation::maker(&stream)?;
                let mut hello = [0; 5];
                stream.read_exact(&mut hello)?;
                stream.write_all(&hello)?;
                Ok(owner)
            });
            let _client = Running::start(&path, &netns, &arguments)?;
            let owner = answering.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
            ensure!(owner.cgroup == number && owner.uid == 40_005, "{to}: {owner:?} in {number}");
        }
        Ok(())
    });
    inside.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    Ok(Verdict::Ran)
}
