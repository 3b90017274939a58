//! The scratch file. It has no name once it is open, so that nothing is left of it however the process ends.
#![allow(unsafe_code)] // system calls that the standard library does not offer

use std::collections::hash_map::RandomState;
use std::fs::{self, File, OpenOptions};
use std::hash::BuildHasher;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::ALIGNMENT;
use crate::{Error, Result};

/// An unnamed file of whole blocks.
pub struct Scratch {
    file: File,
    /// The name that it has, or would have, for messages.
    path: PathBuf,
    direct: bool,
    bytes: Mutex<u64>,
}

impl Scratch {
    /// Makes the file in `folder` and reserves `bytes` of it.
    pub fn create(folder: &Path, bytes: u64) -> Result<Self> {
        let random = RandomState::new().hash_one(std::process::id());
        let path = folder.join(format!("infold-{}-{random:016x}.tier", std::process::id()));
        let file = open_unnamed(folder, &path).map_err(|source| Error::io("create the file", &path, source))?;
        let direct = set_direct(&file);
        let scratch = Self { file, path, direct, bytes: Mutex::new(0) };
        scratch.reserve(bytes)?;
        Ok(scratch)
    }

    /// Adds `bytes`, rounded up to whole blocks, and returns where they begin. The disk has set them aside.
    pub fn reserve(&self, bytes: u64) -> Result<u64> {
        let mut end = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let start = *end;
        let most = i64::MAX as u64 - (ALIGNMENT as u64 - 1) - start;
        if bytes > most {
            return Err(Error::argument("nbytes", format!("at most {most}"), bytes));
        }
        let bytes = bytes.next_multiple_of(ALIGNMENT as u64);
        if bytes > 0 {
            self.allocate(start, bytes).map_err(|source| {
                // What was set aside before the disk was full.
                let _ = self.file.set_len(start);
                self.error(&format!("set aside {bytes} bytes"), source)
            })?;
        }
        *end = start + bytes;
        Ok(start)
    }

    fn allocate(&self, start: u64, bytes: u64) -> io::Result<()> {
        loop {
            // SAFETY: the descriptor is open; no memory is handed over.
            let code =
                unsafe { libc::posix_fallocate(self.file.as_raw_fd(), start as libc::off_t, bytes as libc::off_t) };
            match code {
                0 => return Ok(()),
                libc::EINTR => {}
                code => return Err(io::Error::from_raw_os_error(code)),
            }
        }
    }

    pub fn bytes(&self) -> u64 {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether transfers go past the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The error of an action on this file.
    pub fn error(&self, action: &str, source: io::Error) -> Error {
        Error::io(action, &self.path, source)
    }

    /// Drops a range that was just read or written from the page cache, where direct transfers are refused.
    pub fn forget(&self, offset: u64, bytes: u64, written: bool) -> io::Result<()> {
        if self.direct {
            return Ok(());
        }
        if written {
            self.file.sync_data()?; // only clean pages can be dropped
        }
        // SAFETY: the descriptor is open; no memory is handed over.
        unsafe {
            let (fd, advice) = (self.file.as_raw_fd(), libc::POSIX_FADV_DONTNEED);
            libc::posix_fadvise(fd, offset as libc::off_t, bytes as libc::off_t, advice)
        };
        Ok(())
    }
}

/// A file that never had a name, or else one whose name is gone again.
fn open_unnamed(folder: &Path, path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    // With O_EXCL nobody can give it a name later.
    match options.clone().custom_flags(libc::O_TMPFILE | libc::O_EXCL).open(folder) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {}
        result => return result,
    }
    let file = options.create_new(true).open(path)?;
    fs::remove_file(path)?;
    Ok(file)
}

/// Asks that transfers go past the page cache. Filesystems may refuse.
fn set_direct(file: &File) -> bool {
    let fd = file.as_raw_fd();
    // SAFETY: the descriptor is open; no memory is handed over.
    unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        flags >= 0 && libc::fcntl(fd, libc::F_SETFL, flags | libc::O_DIRECT) == 0
    }
}
