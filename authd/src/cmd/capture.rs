//! Frames out of a capture file.

use std::{fs::File, path::Path};

use anyhow::{Context, anyhow, bail, ensure};
use pcap_parser::{Linktype, PcapBlockOwned, PcapError, create_reader, traits::PcapNGPacketBlock};

/// The longest frame that a capture may hold (`MAXIMUM_SNAPLEN` of libpcap).
const MAX_FRAME: usize = 262_144;

/// Calls back with each Ethernet frame, in order.
pub fn frames(path: &Path, mut each: impl FnMut(&[u8]) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    let broken = |error: String| anyhow!("{} is no capture that can be read: {error}", path.display());
    let mut reader = create_reader(2 * MAX_FRAME, file).map_err(|error| broken(error.to_string()))?;
    let ethernet = |linktype: Linktype| {
        ensure!(linktype == Linktype::ETHERNET, "{}: frames of {linktype}, not of Ethernet", path.display());
        Ok(())
    };
    let mut full = 0;
    loop {
        match reader.next() {
            Ok((length, block)) => {
                full = 0;
                match block {
                    PcapBlockOwned::LegacyHeader(header) => ethernet(header.network)?,
                    PcapBlockOwned::Legacy(packet) => each(packet.data)?,
                    PcapBlockOwned::NG(pcap_parser::Block::InterfaceDescription(interface)) => {
                        ethernet(interface.linktype)?;
                    }
                    PcapBlockOwned::NG(pcap_parser::Block::EnhancedPacket(packet)) => each(packet.packet_data())?,
                    PcapBlockOwned::NG(pcap_parser::Block::SimplePacket(packet)) => each(packet.packet_data())?,
                    PcapBlockOwned::NG(_) => {}
                }
                reader.consume(length);
            }
            Err(PcapError::Eof) => return Ok(()),
            Err(PcapError::Incomplete(_)) => {
                // Nothing came of a full buffer: a block that claims to be longer than any.
                full += 1;
                if full > 2 {
                    bail!(broken("it ends inside a frame, or holds one that is too long".to_owned()));
                }
                reader.refill().map_err(|error| broken(error.to_string()))?;
            }
            Err(error) => bail!(broken(error.to_string())),
        }
    }
}
