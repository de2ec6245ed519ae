//! Downloads a file of the hub into a blob of the cache.
//!
//! Bytes go to a temporary file, which gets the blob's name once complete and verified against the
//! hub's sha256, if it sends one. A large file is resumed where it was cut, also by a later process:
//! `blobs/SHA256.incomplete`, locked while it grows. Any other file starts over in each process.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use gptq_types::ContentHasher;
use ureq::Body;
use ureq::http::{HeaderMap, Response};

use crate::client::{Answer, Client, Headers, Said, Trouble};

const BUFFER_BYTES: usize = 1 << 20;
/// Limit for a file of undeclared length: the largest file that the hub accepts.
const MOST_UNDECLARED_BYTES: u64 = 50_000_000_000;

/// A file that arrived.
pub(crate) struct Arrived {
    pub blob: PathBuf,
    /// The commit that the hub says it belongs to.
    pub commit: Option<String>,
}

/// Why a file did not arrive: trouble, or other bytes than announced.
pub(crate) enum Failed {
    Trouble(Trouble),
    Digest { found: String, expected: String },
}

/// The growing file and what is known of it.
struct Transfer<'a> {
    client: &'a Client,
    blobs: &'a Path,
    partial: Option<Partial>,
    /// The beginning came with another answer.
    resumed: bool,
    /// Validator of the answer that gave the bytes so far; a transfer is resumed only under the same one.
    validator: Option<String>,
    said: Said,
    progress: &'a mut dyn FnMut(u64, u64),
}

struct Partial {
    file: File,
    path: PathBuf,
    have: u64,
    /// Its name is the hash of what it will hold.
    named: bool,
}

/// Fetches what is at `url` into the folder `blobs`; `progress` hears bytes and all bytes.
///
/// A file that went on where another process stopped and is not what was announced is fetched once
/// more from its beginning.
pub(crate) fn fetch(
    client: &Client,
    url: &str,
    blobs: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Arrived, Failed> {
    fs::create_dir_all(blobs).map_err(|error| Failed::Trouble(Trouble::Disk("write", error)))?;
    let mut transfer = Transfer {
        client,
        blobs,
        partial: None,
        resumed: false,
        validator: None,
        said: Said::default(),
        progress,
    };
    match transfer.run(url) {
        Err(Failed::Digest { .. }) if transfer.resumed => {
            transfer.resumed = false;
            transfer.run(url)
        }
        result => result,
    }
}

impl Transfer<'_> {
    fn run(&mut self, url: &str) -> Result<Arrived, Failed> {
        let client = self.client;
        let reached = Cell::new(0);
        let fetched = client.persist(
            || {
                let result = self.attempt(url);
                reached.set(self.partial.as_ref().map_or(0, |partial| partial.have));
                result
            },
            || reached.get(),
        );
        match fetched {
            Ok(Some(blob)) => Ok(self.arrived(blob)),
            Ok(None) => self.settle(),
            Err(trouble) => {
                self.tidy();
                Err(Failed::Trouble(trouble))
            }
        }
    }

    /// One chain of requests and the bytes of its last answer; a blob where it was there already.
    fn attempt(&mut self, url: &str) -> Result<Option<PathBuf>, Trouble> {
        let mut found = None;
        let asked = self.client.get(url, &mut |said| {
            if found.is_none() && self.partial.is_none() {
                found = open_named(self.blobs, said, &mut self.partial)?;
            }
            Ok(self.range())
        });
        if let Some(blob) = found {
            return Ok(Some(blob));
        }
        let Answer { response, said } = asked?;
        self.said = said;
        if self.partial.is_none()
            && let Some(blob) = open_named(self.blobs, &self.said, &mut self.partial)?
        {
            return Ok(Some(blob));
        }
        if self.partial.is_none() {
            self.partial = Some(Partial::nameless(self.blobs)?);
        }
        let had = self.partial.as_ref().map_or(0, |partial| partial.have);
        let total = self.begin(&response)?;
        self.resumed |= had > 0 && response.status() == 206;
        self.take(response, total)?;
        Ok(None)
    }

    /// Asks for the rest where what is there is known to be the beginning of the same file.
    fn range(&self) -> Headers {
        let Some(partial) = self.partial.as_ref().filter(|partial| partial.have > 0) else {
            return Vec::new();
        };
        let range = ("range", format!("bytes={}-", partial.have));
        match &self.validator {
            Some(validator) => vec![range, ("if-range", validator.clone())],
            None if partial.named => vec![range],
            None => Vec::new(),
        }
    }

    /// Puts the file where the answer begins; returns how long it will be, if that is declared.
    fn begin(&mut self, response: &Response<Body>) -> Result<Option<u64>, Trouble> {
        let headers = response.headers();
        let partial = self.partial.as_mut().expect("opened before");
        let have = partial.have;
        let encoded = is_encoded(headers);
        let (start, total) = match response.status().as_u16() {
            206 if !encoded => content_range(headers).unwrap_or((u64::MAX, None)),
            200 => (0, number(headers, "content-length").filter(|_| !encoded)),
            _ => (u64::MAX, None),
        };
        self.validator = strong_etag(headers);
        if start != 0 && start != have {
            // a range that was not asked for, or one beyond the end: from the beginning again
            partial.restart()?;
            self.validator = None;
            return Err(Trouble::Passing(
                "an answer with other bytes than asked for".into(),
                None,
            ));
        }
        if start == 0 {
            partial.restart()?;
        }
        match (total, self.said.linked_size) {
            (Some(total), Some(size)) if total != size => Err(Trouble::Lasting(format!(
                "{total} bytes were announced, but the file has {size}"
            ))),
            (total, size) => Ok(total.or(size)),
        }
    }

    fn take(&mut self, response: Response<Body>, total: Option<u64>) -> Result<(), Trouble> {
        let partial = self.partial.as_mut().expect("opened before");
        let limit = total.unwrap_or(MOST_UNDECLARED_BYTES);
        let mut body = response
            .into_body()
            .into_with_config()
            .limit(u64::MAX)
            .reader();
        let mut buffer = vec![0u8; BUFFER_BYTES];
        (self.progress)(partial.have, total.unwrap_or(0));
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.client.broken(&error)),
            };
            if partial.have + count as u64 > limit {
                return Err(Trouble::Lasting(format!("more than {limit} bytes")));
            }
            let written = partial.file.write_all(&buffer[..count]);
            written.map_err(|error| Trouble::Disk("write", error))?;
            partial.have += count as u64;
            (self.progress)(partial.have, total.unwrap_or(partial.have));
        }
        match total {
            Some(total) if partial.have < total => {
                let reason = format!("cut off at byte {} of {total}", partial.have);
                Err(Trouble::Passing(reason, None))
            }
            _ => Ok(()),
        }
    }

    /// Checks what arrived and gives it its name.
    fn settle(&mut self) -> Result<Arrived, Failed> {
        let disk = |error| Failed::Trouble(Trouble::Disk("write", error));
        let partial = self.partial.take().expect("filled before");
        let found = hash(&partial.path).map_err(disk)?;
        let expected = self.said.linked_etag.clone().filter(|tag| is_sha256(tag));
        if let Some(expected) = expected.filter(|expected| *expected != found) {
            let _ = fs::remove_file(&partial.path);
            return Err(Failed::Digest { found, expected });
        }
        // An entity tag that is no hash names one version of one file, not its content: two files
        // of a mirror may share it.
        let tag = self.said.linked_etag.clone().or(self.said.etag.clone());
        let named = tag
            .filter(|tag| is_hex(tag, 40))
            .map(|tag| self.blobs.join(tag));
        let blob = match named {
            Some(blob) if is_same(&blob, &found).map_err(disk)? => blob,
            _ => self.blobs.join(&found),
        };
        partial.file.sync_all().map_err(disk)?;
        fs::rename(&partial.path, &blob).map_err(disk)?;
        Ok(self.arrived(blob))
    }

    fn arrived(&self, blob: PathBuf) -> Arrived {
        Arrived {
            blob,
            commit: self.said.commit.clone(),
        }
    }

    /// Removes a partial file that no later process could resume.
    fn tidy(&mut self) {
        if let Some(partial) = self.partial.take()
            && (!partial.named || partial.have == 0)
        {
            let _ = fs::remove_file(&partial.path);
        }
    }
}

/// Opens the file of a hash that the hub announced; returns the blob where it is there already.
fn open_named(
    blobs: &Path,
    said: &Said,
    partial: &mut Option<Partial>,
) -> Result<Option<PathBuf>, Trouble> {
    let Some(tag) = said.linked_etag.as_ref().filter(|tag| is_sha256(tag)) else {
        return Ok(None);
    };
    let disk = |error| Trouble::Disk("write", error);
    let blob = blobs.join(tag);
    let opened = Partial::named(blobs.join(format!("{tag}.incomplete"))).map_err(disk)?;
    // whoever held the lock may have finished it
    if blob.is_file() {
        if hash(&blob).map_err(disk)? == *tag {
            let _ = fs::remove_file(&opened.path);
            return Ok(Some(blob));
        }
        fs::remove_file(&blob).map_err(disk)?;
    }
    *partial = Some(opened);
    Ok(None)
}

impl Partial {
    /// Waits for a process that fetches the same file; a dead one holds no lock.
    fn named(path: PathBuf) -> io::Result<Self> {
        loop {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false);
            let mut file = file.open(&path)?;
            // some network file systems have no locks: then the hash tells whether two met
            match file.lock() {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                locked => locked?,
            }
            // it may have become the blob, or gone, while this process waited
            let same = fs::metadata(&path)
                .is_ok_and(|there| file.metadata().is_ok_and(|own| own.ino() == there.ino()));
            if same {
                let have = file.seek(SeekFrom::End(0))?;
                let named = true;
                return Ok(Partial {
                    file,
                    path,
                    have,
                    named,
                });
            }
        }
    }

    fn nameless(blobs: &Path) -> Result<Self, Trouble> {
        let path = blobs.join(format!(".gptq-{}.incomplete", unmistakable()));
        let file = File::create(&path).map_err(|error| Trouble::Disk("write", error))?;
        Ok(Partial {
            file,
            path,
            have: 0,
            named: false,
        })
    }

    fn restart(&mut self) -> Result<(), Trouble> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.rewind());
        self.have = 0;
        emptied.map_err(|error| Trouble::Disk("write", error))
    }
}

/// A part of a file's name that no other thread, process or machine chooses at the same time.
pub(crate) fn unmistakable() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let nanoseconds = now.map_or(0, |now| now.as_nanos());
    format!("{}-{nanoseconds}-{count}", std::process::id())
}

/// Whether the blob is absent or has that content.
fn is_same(blob: &Path, hash_of_new: &str) -> io::Result<bool> {
    Ok(!blob.is_file() || hash(blob)? == hash_of_new)
}

/// sha256 of a file.
fn hash(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0u8; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish().to_string()),
            count => hasher.update(&buffer[..count]),
        }
    }
}

fn is_sha256(text: &str) -> bool {
    is_hex(text, 64)
}

fn is_hex(text: &str, digits: usize) -> bool {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    text.len() == digits && text.bytes().all(digit)
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

/// Whether the body is encoded in spite of `identity`; the HTTP library decodes it, but then the
/// declared length does not match.
fn is_encoded(headers: &HeaderMap) -> bool {
    text(headers, "content-encoding").is_some_and(|how| !how.eq_ignore_ascii_case("identity"))
}

/// The entity tag if strong: only a strong one proves that two answers are parts of one file.
fn strong_etag(headers: &HeaderMap) -> Option<String> {
    let tag = text(headers, "etag")?.trim();
    tag.starts_with('"').then(|| tag.to_string())
}

/// `bytes 5-9/10` as 5 and 10.
fn content_range(headers: &HeaderMap) -> Option<(u64, Option<u64>)> {
    let range = text(headers, "content-range")?
        .trim()
        .strip_prefix("bytes ")?;
    let (span, total) = range.split_once('/')?;
    let (start, _) = span.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}
