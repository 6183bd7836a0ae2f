//! Where a store cannot live: file systems on which two processes can open it at once, or that lose what was synced.

use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Kinds of FUSE that are a local disk, or a layer over one.
const LOCAL_FUSE: [&str; 4] = ["fuseblk", "fuse.fuse-overlayfs", "fuse.overlayfs", "fuse.lxcfs"];
/// Links followed one after the other; the kernel follows no more, either.
const LINKS: u32 = 40;

/// Why the file system of `path` cannot hold a store, if it is known that it cannot.
///
/// Seen with Cloud Storage FUSE: no locks, the last writer wins, nothing is durable before the file is closed. NFS without
/// locks (as Cloud Run mounts it) lets two relayers write to one file.
pub(super) fn unsuitable(path: &Path) -> Option<String> {
    let mounts = fs::read("/proc/self/mountinfo").ok()?;
    unsuitable_among(&String::from_utf8_lossy(&mounts), path)
}

/// The same among these mounts.
fn unsuitable_among(mounts: &str, path: &Path) -> Option<String> {
    judge(mounts, &resolved(path)?)
}

/// The file that is opened, or made, by that path: where links lead, those to what is not there included. `None`: to
/// nowhere, which opening it says better.
fn resolved(path: &Path) -> Option<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let folder = folder.canonicalize().ok()?;
        let file = folder.join(path.file_name()?);
        match fs::read_link(&file) {
            Ok(target) => path = folder.join(target),
            // It is no link.
            Err(_) => return Some(file),
        }
    }
    None
}

/// The same by the lines of mountinfo: <https://man7.org/linux/man-pages/man5/proc_pid_mountinfo.5.html>.
fn judge(mounts: &str, file: &Path) -> Option<String> {
    let mounts = mounts.lines().filter_map(Mount::parse).filter(|mount| file.starts_with(&mount.at));
    // Of two mounted at one place the later one is seen.
    let mount = mounts.max_by_key(|mount| mount.at.components().count())?;
    let kind = mount.kind.as_str();
    if (kind == "fuse" || kind.starts_with("fuse.")) && !LOCAL_FUSE.contains(&kind) {
        return Some(format!("{} is a mounted bucket or a remote folder ({kind})", mount.at.display()));
    }
    let no_locks = ["nolock", "local_lock=all", "local_lock=flock"];
    if kind.starts_with("nfs") && mount.options.split(',').any(|option| no_locks.contains(&option)) {
        return Some(format!("{} is NFS without locks ({kind})", mount.at.display()));
    }
    None
}

struct Mount {
    at: PathBuf,
    kind: String,
    options: String,
}

impl Mount {
    fn parse(line: &str) -> Option<Self> {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(4);
        let (at, options) = (fields.next()?, fields.next()?);
        let mut of_system = file_system.split(' ');
        let (kind, super_options) = (of_system.next()?, of_system.nth(1).unwrap_or_default());
        let options = format!("{options},{super_options}");
        Some(Self { at: unescape(at), kind: kind.to_owned(), options })
    }
}

/// Blanks and the like in a path are written as `\040`.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| byte == b'\\') {
            Some(escaped) => {
                bytes.push(escaped);
                rest = &after[3..];
            }
            None => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const MOUNTS: &str = r"
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
40 22 0:35 / /bucket rw,nosuid,nodev - fuse.gcsfuse gcsfuse rw,user_id=0,group_id=0
41 22 0:36 / /bucket\040two rw - fuse sshfs rw
42 40 0:37 / /bucket/local rw - tmpfs tmpfs rw,size=1024k
43 22 0:38 / /nolock rw,relatime - nfs 10.0.0.2:/share rw,vers=3,nolock,local_lock=all,addr=10.0.0.2
44 22 0:39 / /nfs4 rw,relatime - nfs4 10.0.0.2:/share rw,vers=4.2,local_lock=none,addr=10.0.0.2
45 22 0:40 / /windows rw - fuseblk /dev/sdb1 rw
46 22 0:41 / /layers rw - fuse.fuse-overlayfs fuse-overlayfs rw
47 22 0:42 / /over rw - fuse.rclone remote: rw
48 22 0:43 / /over rw - xfs /dev/sdc1 rw
49 22 0:44 / /flock rw - nfs 10.0.0.2:/share rw,vers=3,local_lock=flock
";

    #[test]
    fn a_store_is_refused_where_two_could_write_to_it_and_nowhere_else() {
        let table = [
            ("/var/lib/relayer", None),
            ("/bucket", Some("/bucket is a mounted bucket or a remote folder (fuse.gcsfuse)")),
            ("/bucket/deeper/still", Some("/bucket is a mounted bucket or a remote folder (fuse.gcsfuse)")),
            ("/bucket/local", None),
            ("/bucketful", None),
            ("/bucket two/folder", Some("/bucket two is a mounted bucket or a remote folder (fuse)")),
            ("/nolock/relayer", Some("/nolock is NFS without locks (nfs)")),
            ("/flock", Some("/flock is NFS without locks (nfs)")),
            ("/nfs4/relayer", None),
            ("/windows", None),
            ("/layers", None),
            ("/over", None),
        ];
        for (folder, why) in table {
            assert_eq!(judge(MOUNTS, Path::new(folder)).as_deref(), why, "{folder}");
        }
        assert_eq!(judge("what is this\n- - - -\n", Path::new("/")), None);
    }

    #[test]
    fn where_a_store_is_is_where_links_lead_also_those_to_what_is_not_there_yet() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().canonicalize().unwrap().join(name);
        for name in ["bucket", "bucket/deeper", "local"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("bucket/there.redb"), "").unwrap();
        fs::write(at("local/mounted.redb"), "").unwrap();
        for (link, to) in [
            ("local/to_there.redb", at("bucket/there.redb")),
            ("local/to_missing.redb", at("bucket/missing.redb")),
            ("local/relative.redb", "../bucket/deeper/missing.redb".into()),
            ("local/twice.redb", "to_missing.redb".into()),
            ("linked", at("bucket/deeper")),
            ("local/through.redb", at("linked/missing.redb")),
            ("bucket/back.redb", at("local/missing.redb")),
            ("local/circle.redb", "circle.redb".into()),
        ] {
            symlink(to, at(link)).unwrap();
        }
        let bucket = at("bucket").display().to_string();
        let file = at("local/mounted.redb").display().to_string();
        let mounts = format!(
            "22 1 254:1 / / rw - ext4 /dev/vda1 rw\n\
            40 22 0:35 / {bucket} rw - fuse.gcsfuse gcsfuse rw\n\
            41 22 0:36 / {file} rw - fuse.gcsfuse gcsfuse rw\n"
        );
        let refused = [
            "bucket/missing.redb",
            "local/to_there.redb",
            "local/to_missing.redb",
            "local/relative.redb",
            "local/twice.redb",
            "local/through.redb",
            "linked/missing.redb",
            "local/mounted.redb",
        ];
        for name in refused {
            assert!(unsuitable_among(&mounts, &at(name)).is_some(), "{name}");
        }
        for name in ["local/missing.redb", "bucket/back.redb", "local/circle.redb", "nowhere/missing.redb"] {
            assert_eq!(unsuitable_among(&mounts, &at(name)), None, "{name}");
        }
    }

    #[test]
    fn this_machines_own_folder_for_what_is_temporary_can_hold_a_store() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(unsuitable(&folder.path().join("relayer.redb")), None);
    }
}
