//! Array maps whose memory the daemon shares with the kernel: a store instead of a system call.

use std::{io, marker::PhantomData, num::NonZeroUsize, os::fd::AsFd, ptr::NonNull};

use aya::Pod;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The values of a `BPF_F_MMAPABLE` array, each of eight bytes, as the kernel's programs see them.
pub struct MappedArray<T> {
    base: NonNull<u64>,
    length: usize,
    value: PhantomData<T>,
}

// SAFETY: the memory is the kernel's, reachable from any thread; values are written by `&mut self` only.
unsafe impl<T: Send> Send for MappedArray<T> {}

impl<T: Pod> MappedArray<T> {
    pub fn new(map: impl AsFd, length: usize) -> io::Result<Self> {
        const { assert!(size_of::<T>() == 8, "one value is one store") };
        let size = NonZeroUsize::new(length * 8).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a new shared mapping at an address of the kernel's choice, not longer than the map, which stays alive
        // with the mapping.
        let base =
            unsafe { mmap(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, map, 0) }?;
        Ok(Self { base: base.cast(), length, value: PhantomData })
    }

    pub fn len(&self) -> usize {
        self.length
    }

    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Panics beyond the end: indices are the daemon's own.
    pub fn get(&self, index: usize) -> T {
        assert!(index < self.length);
        // SAFETY: inside the mapping, which is aligned to pages; `T` is plain data of eight bytes.
        unsafe { self.base.as_ptr().add(index).cast::<T>().read_volatile() }
    }

    /// One store of eight bytes: a program sees the old value or the new one.
    pub fn set(&mut self, index: usize, value: T) {
        assert!(index < self.length);
        // SAFETY: as for `get`; `u64` because the store must not be split.
        unsafe { self.base.as_ptr().add(index).write_volatile(std::mem::transmute_copy::<T, u64>(&value)) }
    }
}

impl<T> Drop for MappedArray<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nothing borrows from it.
        let _ = unsafe { munmap(self.base.cast(), self.length * 8) };
    }
}
