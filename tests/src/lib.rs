//! Helpers of the tests: namespaces, cgroups, packets, a handle on the daemon.
