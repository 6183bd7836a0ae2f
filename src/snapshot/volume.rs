//! The folder of snapshots, as little as it may be: a mounted bucket, or NFS without locks.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Where snapshots and the lease are kept. What can be relied on is only this: what was written and closed is there for everybody
/// who opens it afterwards; of several who write one file the last one to close it wins. There are no locks, nothing is
/// there before it is closed, and a file that is replaced while it is read may fail.
pub trait Volume: Send + Sync + 'static {
    /// Writes a whole file, in place of one of that name.
    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()>;
    /// A whole file; `None` if there is none.
    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>>;
    /// The names of the files in a folder (`""`: the topmost one); none if there is no such folder.
    fn list(&self, folder: &str) -> io::Result<Vec<String>>;
    /// Removes a file; one that is not there is no fault.
    fn remove(&self, name: &str) -> io::Result<()>;
}

/// A folder of the file system.
#[derive(Clone, Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// That folder. It must be there: one that is not is a volume that is not mounted.
    pub fn new(path: &Path) -> Self {
        Self(path.to_owned())
    }
}

impl Volume for Folder {
    fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let path = self.0.join(name);
        if let Some(folder) = path.parent().filter(|folder| **folder != *self.0) {
            match fs::create_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        // A bucket takes the file when it is closed, and says then if it does not: which only syncing before shows.
        file.sync_all()
    }

    fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let mut bytes = Vec::new();
        match File::open(self.0.join(name)) {
            Ok(mut file) => file.read_to_end(&mut bytes).map(|_| Some(bytes)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.0.is_dir() => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn list(&self, folder: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.0.join(folder)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.0.is_dir() => {
                return Ok(Vec::new());
            }
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }
}
