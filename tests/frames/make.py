"""Frames for the interfaces' program, made by scapy (2.6 or later): python3 make.py, with scapy installed, in this directory.

Writes scapy.pcap, and expected.txt with a line for each frame: what is to become of it, and what it is. The node is 192.0.2.1
and 2001:db8::1. Its workload `db` guards tcp/7001 and udp/7002; the office (192.0.2.0/25, 2001:db8::/80) may call both, and
nobody else may. Nothing is remembered of earlier frames.
"""

import struct

from scapy.all import (
    ARP, GRE, ICMP, IP, SCTP, TCP, UDP, VXLAN, Dot1AD, Dot1Q, Ether, ICMPv6DestUnreach, ICMPv6EchoRequest, IPOption_LSRR,
    IPOption_RR, IPOption_Timestamp, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting,
    PadN, Raw, RouterAlert, fragment, fragment6, wrpcap,
)

NODE4, NODE6 = "192.0.2.1", "2001:db8::1"
OFFICE4, OFFICE6 = "192.0.2.2", "2001:db8::2"
STRANGER4, STRANGER6 = "192.0.2.200", "2001:db8::1:0:0:2"
ETHERNET = Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:01")

frames = []


def add(expected, what, frame):
    frames.append((expected, what, bytes(frame)))


def both(what, make):
    """The same frame from one who may and from one who may not."""
    add("passes", f"{what}, from the office", make(OFFICE4, OFFICE6))
    add("dropped no_rule", f"{what}, from a stranger", make(STRANGER4, STRANGER6))


def v4(source, **fields):
    return IP(src=source, dst=NODE4, **fields)


def v6(source):
    return IPv6(src=source, dst=NODE6)


SYN = TCP(sport=40000, dport=7001, flags="S")
ACK = TCP(sport=40000, dport=7001, flags="A") / b"payload"
CALL = UDP(sport=40000, dport=7002) / b"payload"

# Plain, by each family and behind each kind of tag.
for name, segment in [("SYN", SYN), ("segment", ACK), ("datagram", CALL)]:
    both(f"IPv4 {name}", lambda a, _: ETHERNET / v4(a) / segment)
    both(f"IPv6 {name}", lambda _, a: ETHERNET / v6(a) / segment)
    both(f"IPv4 {name}, 802.1Q", lambda a, _: ETHERNET / Dot1Q(vlan=7) / v4(a) / segment)
    both(f"IPv6 {name}, 802.1Q", lambda _, a: ETHERNET / Dot1Q(vlan=7) / v6(a) / segment)
    both(f"IPv4 {name}, 802.1ad", lambda a, _: ETHERNET / Dot1AD(vlan=7) / Dot1Q(vlan=8) / v4(a) / segment)
    both(f"IPv6 {name}, two 802.1Q", lambda _, a: ETHERNET / Dot1Q(vlan=7) / Dot1Q(vlan=8) / v6(a) / segment)
    add("untouched", f"IPv4 {name}, three tags",
        ETHERNET / Dot1AD() / Dot1Q() / Dot1Q() / v4(STRANGER4) / segment)

# All that flags can say: none is let in because of them.
for flags in ["", "F", "R", "SA", "SF", "FPU", "SR", "FSRPAUEC"]:
    both(f"TCP flags {flags or 'none'}", lambda a, _: ETHERNET / v4(a) / TCP(sport=40000, dport=7001, flags=flags))
both("TCP with options", lambda a, _: ETHERNET / v4(a) / TCP(
    sport=40000, dport=7001, flags="S", options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("WScale", 7)]))
both("a data offset beyond the segment", lambda a, _: ETHERNET / v4(a) / TCP(
    sport=40000, dport=7001, flags="S", dataofs=15))
both("a wrong checksum", lambda a, _: ETHERNET / v4(a) / TCP(sport=40000, dport=7001, flags="S", chksum=1))
both("a TTL of 0", lambda a, _: ETHERNET / v4(a, ttl=0) / SYN)
both("fast open", lambda a, _: ETHERNET / v4(a) / TCP(
    sport=40000, dport=7001, flags="S", options=[(34, b"12345678")]) / b"early")

# IPv4 options, up to the longest header.
both("IPv4 record route", lambda a, _: ETHERNET / v4(a, options=IPOption_RR(routers=["0.0.0.0"] * 3)) / SYN)
both("IPv4 source route", lambda a, _: ETHERNET / v4(a, options=IPOption_LSRR(routers=[NODE4])) / SYN)
both("IPv4 timestamp and datagram", lambda a, _: ETHERNET / v4(a, options=IPOption_Timestamp()) / CALL)
both("IPv4, 40 bytes of options", lambda a, _: ETHERNET / v4(a, options=b"\x01" * 40) / SYN)

# IPv6 extension headers.
HOPS = IPv6ExtHdrHopByHop(options=[RouterAlert()])
PADDED = IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 12)])
both("IPv6 hop-by-hop", lambda _, a: ETHERNET / v6(a) / HOPS / SYN)
both("IPv6 destination options", lambda _, a: ETHERNET / v6(a) / PADDED / SYN)
both("IPv6 hop-by-hop, routing, options", lambda _, a: ETHERNET / v6(a) / HOPS / IPv6ExtHdrRouting(
    addresses=[NODE6]) / PADDED / SYN)
both("IPv6 atomic fragment", lambda _, a: ETHERNET / v6(a) / IPv6ExtHdrFragment(offset=0, m=0) / SYN)
eight, nine = v6(STRANGER6), v6(STRANGER6)
for _ in range(7):
    eight = eight / IPv6ExtHdrDestOpt()
for _ in range(9):
    nine = nine / IPv6ExtHdrDestOpt()
add("dropped no_rule", "IPv6, seven headers", ETHERNET / eight / SYN)
add("untouched", "IPv6, nine headers", ETHERNET / nine / SYN)
add("untouched", "IPv6 hop-by-hop that is longer than the packet",
    ETHERNET / v6(STRANGER6) / IPv6ExtHdrHopByHop(len=255) / SYN)

# Fragments: the first says where it goes, the others do not.
long4 = v4(STRANGER4, id=7) / UDP(sport=40000, dport=7002) / (b"x" * 3000)
for number, piece in enumerate(fragment(long4, fragsize=1480)):
    add("dropped no_rule" if number == 0 else "untouched", f"IPv4 fragment {number}", ETHERNET / piece)
long6 = v6(STRANGER6) / IPv6ExtHdrFragment(id=7) / UDP(sport=40000, dport=7002) / (b"x" * 3000)
for number, piece in enumerate(fragment6(long6, 1400)):
    add("dropped no_rule" if number == 0 else "untouched", f"IPv6 fragment {number}", ETHERNET / piece)
add("untouched", "a first fragment without its ports (RFC 1858)",
    ETHERNET / v4(STRANGER4, flags="MF", proto=6) / Raw(b"\x9c\x40"))
add("untouched", "a fragment that would overlap the TCP header", ETHERNET / v4(STRANGER4, frag=1, proto=6) / Raw(b"x" * 16))

# What nobody guards.
for what, frame in [
    ("another port", v4(STRANGER4) / TCP(sport=40000, dport=7009, flags="S")),
    ("the port by the other protocol", v4(STRANGER4) / UDP(sport=40000, dport=7001)),
    ("another address", IP(src=STRANGER4, dst="192.0.2.77") / SYN),
    ("ICMP", v4(STRANGER4) / ICMP()),
    ("ICMP about a flow", v4(STRANGER4) / ICMP(type=3, code=4) / IP(src=NODE4, dst=STRANGER4) / TCP(sport=7001)),
    ("SCTP to the port's number", v4(STRANGER4) / SCTP(dport=7001)),
    ("a tunnel with a SYN", v4(STRANGER4) / IP(src=STRANGER4, dst=NODE4) / SYN),
    ("GRE with a SYN", v4(STRANGER4) / GRE() / IP(src=STRANGER4, dst=NODE4) / SYN),
    ("VXLAN with a SYN", v4(STRANGER4) / UDP(dport=4789) / VXLAN() / ETHERNET / IP(dst=NODE4) / SYN),
    ("ICMPv6", v6(STRANGER6) / ICMPv6EchoRequest()),
    ("ICMPv6 about a flow", v6(STRANGER6) / ICMPv6DestUnreach() / IPv6(src=NODE6, dst=STRANGER6) / TCP(sport=7001)),
]:
    add("untouched", what, ETHERNET / frame)
add("untouched", "ARP", ETHERNET / ARP(psrc=STRANGER4, pdst=NODE4))
add("untouched", "IEEE 802.3 with a length", Ether(src=ETHERNET.src, dst=ETHERNET.dst, type=46) / Raw(b"x" * 46))

# Cut off after each byte of the headers.
whole = bytes(ETHERNET / v4(STRANGER4) / SYN)
for length in range(14, len(whole)):
    # Ports and flags have to be there.
    add("dropped no_rule" if length >= 14 + 20 + 14 else "untouched", f"IPv4 SYN, {length} bytes", whole[:length])
whole = bytes(ETHERNET / Dot1Q(vlan=7) / v6(STRANGER6) / PADDED / SYN)
for length in range(14, len(whole)):
    add("dropped no_rule" if length >= 18 + 40 + 16 + 14 else "untouched", f"IPv6 SYN, {length} bytes", whole[:length])

# Headers that say what is not so.
plain = bytearray(bytes(ETHERNET / v4(STRANGER4) / SYN))
for value, what in [(0x44, "a header of 16 bytes"), (0x4f, "a header longer than the frame"), (0x55, "version 5")]:
    broken = bytearray(plain)
    broken[14] = value
    add("untouched", f"IPv4, {what}", bytes(broken))
for length in [0, 20, 65535]:
    broken = bytearray(plain)
    broken[16:18] = struct.pack("!H", length)
    # The stack drops it; what its ports say is all that matters here.
    add("dropped no_rule", f"IPv4, a total length of {length}", bytes(broken))

wrpcap("scapy.pcap", [Raw(frame) for _, _, frame in frames], linktype=1)
with open("expected.txt", "w", encoding="utf-8") as file:
    file.writelines(f"{expected}\t{what}\n" for expected, what, _ in frames)
print(len(frames), "frames")
