//! The socket's file: where it is, how it comes to be, and how long names are reached.

use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// The longest path a socket's address takes on every Unix, in bytes.
const LONGEST: usize = 100;

/// Beside the store.
pub fn socket_path(store: &Path) -> PathBuf {
    beside(store, ".sock")
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(ending);
    name.into()
}

/// Connects to the relayer that has that store.
pub async fn connect(store: &Path) -> io::Result<UnixStream> {
    let reached = Reached::new(&socket_path(store))?;
    UnixStream::connect(&reached.path).await
}

/// A path short enough for a socket's address.
struct Reached {
    path: PathBuf,
    /// What the path leads through.
    _folder: Option<File>,
}

impl Reached {
    fn new(path: &Path) -> io::Result<Self> {
        if path.as_os_str().as_bytes().len() <= LONGEST {
            return Ok(Self { path: path.to_owned(), _folder: None });
        }
        // Linux: the folder by its open file is a short name for it.
        let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let folder = File::open(folder_of(path))?;
        let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
        if !short.parent().is_some_and(Path::exists) || short.as_os_str().as_bytes().len() > LONGEST {
            let why = format!("{} is longer than a socket's path may be", path.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Self { path: short, _folder: Some(folder) })
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The socket's file. Dropped, it is gone: before the store is closed, or it might be another's by then.
pub(super) struct Named(PathBuf);

impl Drop for Named {
    fn drop(&mut self) {
        // Nobody is told: what is left is replaced by the next one.
        let _ = fs::remove_file(&self.0);
    }
}

/// Only whoever has the store's lock may call this: then a socket that is there is of a dead process.
pub(super) fn listen(store: &Path) -> io::Result<(UnixListener, Named)> {
    let path = socket_path(store);
    match path.symlink_metadata() {
        Ok(file) if !file.file_type().is_socket() => {
            let why = format!("{} is there and not a socket", path.display());
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, why));
        }
        Ok(_) | Err(_) => {}
    }
    // It is made where nobody else can reach it, and moved to its name when its mode is right.
    let folder = beside(store, ".sock.new");
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    DirBuilder::new().mode(0o700).create(&folder)?;
    let made = make(&folder.join("s"), &path);
    let removed = fs::remove_dir_all(&folder);
    let listening = (made?, Named(path));
    removed.map(|()| listening)
}

fn make(unnamed: &Path, path: &Path) -> io::Result<UnixListener> {
    let listener = UnixListener::bind(&Reached::new(unnamed)?.path)?;
    fs::set_permissions(unnamed, Permissions::from_mode(0o600))?;
    fs::rename(unnamed, path)?;
    Ok(listener)
}
