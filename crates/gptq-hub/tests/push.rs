//! Pushing to the hub, played by a small server on this machine that keeps what it gets.
#![cfg(feature = "hub")]
#![allow(missing_docs)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use base64::Engine;
use gptq_hub::{HubError, Push, PushContent, PushFile, Pushed, ResolveOptions, push_branches};
use gptq_types::ContentHash;
use serde_json::{Value, json};

const TOKEN: &str = "hf_secret";
const REPO: &str = "me/model-GPTQ";
/// No test asks for more.
const MAX_REQUESTS: usize = 100;

/// The server's content and behaviour.
#[derive(Default)]
struct State {
    exists: bool,
    /// Branch, then file, then content or the oid of an object.
    branches: BTreeMap<String, BTreeMap<String, Stored>>,
    objects: BTreeMap<String, Vec<u8>>,
    parts: BTreeMap<String, Vec<u8>>,
    puts: usize,
    /// The connection breaks in the middle of this upload, counted from 1.
    break_at: Option<usize>,
    /// Objects above this size are uploaded in parts of it.
    chunk: Option<usize>,
    full: bool,
    requests: Vec<String>,
}

enum Stored {
    Inline(Vec<u8>),
    Object(String),
}

struct Hub {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State::default()));
        let kept = state.clone();
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().take(MAX_REQUESTS) {
                if !serve(stream.unwrap(), &mut kept.lock().unwrap(), address) {
                    return;
                }
            }
        });
        Hub {
            address,
            state,
            thread: Some(thread),
        }
    }

    fn options(&self, token: Option<&str>, cache: &Path) -> ResolveOptions {
        ResolveOptions {
            offline: false,
            cache_dir: Some(cache.join("hub")),
            endpoint: Some(format!("http://{}", self.address)),
            token: token.map(str::to_string),
            ..ResolveOptions::default()
        }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        if let Ok(mut stream) = TcpStream::connect(self.address) {
            let _ = stream.write_all(b"STOP / HTTP/1.1\r\n\r\n");
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers one request and closes; false for the request to stop.
fn serve(mut stream: TcpStream, state: &mut State, address: SocketAddr) -> bool {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut first = String::new();
    reader.read_line(&mut first).unwrap();
    let mut words = first.split(' ');
    let (method, path) = (
        words.next().unwrap(),
        words.next().unwrap_or("").to_string(),
    );
    if method == "STOP" {
        return false;
    }
    let (mut length, mut authorized) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        if line.trim().is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').unwrap();
        match name.to_lowercase().as_str() {
            "content-length" => length = value.trim().parse().unwrap(),
            "authorization" => authorized = value.trim() == format!("Bearer {TOKEN}"),
            "transfer-encoding" => panic!("a store takes no chunked body"),
            _ => {}
        }
    }
    state.requests.push(format!("{method} {path}"));
    if path.starts_with("/store/") {
        assert!(!authorized, "the token went to the store");
        state.puts += usize::from(method == "PUT");
        if state.break_at == Some(state.puts) {
            let mut some = vec![0; length / 2];
            reader.read_exact(&mut some).unwrap();
            return true; // closes in the middle of the body
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    let (status, etag, text) = match authorized || path.starts_with("/store/") {
        true => answer(method, &path, body, state, address),
        false => (
            401,
            String::new(),
            json!({"error": "Invalid token"}).to_string(),
        ),
    };
    let head = format!(
        "HTTP/1.1 {status} x\r\n{etag}content-length: {}\r\nconnection: close\r\n\r\n",
        text.len()
    );
    let _ = stream.write_all(format!("{head}{text}").as_bytes());
    true
}

fn answer(
    method: &str,
    path: &str,
    body: Vec<u8>,
    state: &mut State,
    address: SocketAddr,
) -> (u16, String, String) {
    let ok = |text: String| (200, String::new(), text);
    let api = format!("/api/models/{REPO}");
    let named = |rest: &str| rest.split('?').next().unwrap().replace("%2F", "/");
    if path == "/api/repos/create" {
        let asked: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (asked["organization"].as_str(), asked["type"].as_str()),
            (Some("me"), Some("model"))
        );
        if state.exists {
            return (409, String::new(), "{}".into());
        }
        state.exists = true;
        let first = Stored::Inline(b"*.bin filter=lfs\n".to_vec());
        let files = BTreeMap::from([(".gitattributes".to_string(), first)]);
        state.branches.insert("main".into(), files);
        return ok("{}".into());
    }
    if let Some(branch) = path.strip_prefix(&format!("{api}/tree/")) {
        let Some(files) = state.branches.get(&named(branch)) else {
            return (
                404,
                String::new(),
                json!({"error": "Invalid rev id"}).to_string(),
            );
        };
        let listed: Vec<Value> = (files.iter())
            .map(|(path, stored)| match stored {
                Stored::Inline(bytes) => {
                    json!({"type": "file", "path": path, "oid": git_oid(bytes)})
                }
                Stored::Object(oid) => {
                    json!({"type": "file", "path": path, "oid": "p", "lfs": {"oid": oid}})
                }
            })
            .collect();
        return ok(json!(listed).to_string());
    }
    if let Some(branch) = path.strip_prefix(&format!("{api}/branch/")) {
        state.branches.insert(named(branch), BTreeMap::new());
        return ok("{}".into());
    }
    if path.ends_with("/info/lfs/objects/batch") {
        if state.full {
            let text = json!({"error": "Private repository storage limit reached"});
            return (403, String::new(), text.to_string());
        }
        return ok(batch(&body, state, address));
    }
    if let Some(oid) = path.strip_prefix("/store/whole/") {
        let expected: String = hex(&body);
        assert_eq!(oid, expected, "the content is not what its name says");
        state.objects.insert(oid.to_string(), body);
        return ok(String::new());
    }
    if let Some(part) = path.strip_prefix("/store/part/") {
        state.parts.insert(part.to_string(), body);
        return (200, format!("etag: \"{part}\"\r\n"), String::new());
    }
    if let Some(oid) = path.strip_prefix("/store/join/") {
        let asked: Value = serde_json::from_slice(&body).unwrap();
        let joined: Vec<u8> = (asked["parts"].as_array().unwrap().iter())
            .flat_map(|part| state.parts[part["etag"].as_str().unwrap().trim_matches('"')].clone())
            .collect();
        assert_eq!(hex(&joined), oid);
        state.objects.insert(oid.to_string(), joined);
        return ok("{}".into());
    }
    if let Some(branch) = path.strip_prefix(&format!("{api}/commit/")) {
        return commit(&named(branch), &body, state);
    }
    panic!("{method} {path}");
}

fn batch(body: &[u8], state: &State, address: SocketAddr) -> String {
    let asked: Value = serde_json::from_slice(body).unwrap();
    assert_eq!(asked["operation"], "upload");
    let objects: Vec<Value> = (asked["objects"].as_array().unwrap().iter())
        .map(|object| {
            let (oid, size) = (
                object["oid"].as_str().unwrap(),
                object["size"].as_u64().unwrap(),
            );
            if state.objects.contains_key(oid) {
                return json!({"oid": oid, "size": size});
            }
            let at = |place: &str| format!("http://{address}/store/{place}");
            let upload = match state.chunk {
                Some(chunk) if size as usize > chunk => {
                    let mut header = json!({"chunk_size": chunk.to_string()});
                    for part in 1..=(size as usize).div_ceil(chunk) {
                        header[format!("{part:05}")] = json!(at(&format!("part/{oid}-{part}")));
                    }
                    json!({"href": at(&format!("join/{oid}")), "header": header})
                }
                _ => json!({"href": at(&format!("whole/{oid}"))}),
            };
            json!({"oid": oid, "size": size, "actions": {"upload": upload}})
        })
        .collect();
    json!({"transfer": "basic", "objects": objects}).to_string()
}

fn commit(branch: &str, body: &[u8], state: &mut State) -> (u16, String, String) {
    let files = state.branches.get_mut(branch).unwrap();
    for line in std::str::from_utf8(body).unwrap().lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        let value = &line["value"];
        let path = value["path"].as_str().unwrap_or_default().to_string();
        match line["key"].as_str().unwrap() {
            "header" => assert!(value["summary"].is_string()),
            "deletedFile" => assert!(files.remove(&path).is_some()),
            "file" => {
                let engine = base64::engine::general_purpose::STANDARD;
                let content = engine.decode(value["content"].as_str().unwrap()).unwrap();
                files.insert(path, Stored::Inline(content));
            }
            "lfsFile" => {
                let oid = value["oid"].as_str().unwrap().to_string();
                assert!(
                    state.objects.contains_key(&oid),
                    "a commit without its object"
                );
                files.insert(path, Stored::Object(oid));
            }
            other => panic!("{other}"),
        }
    }
    (200, String::new(), json!({"commitOid": "0"}).to_string())
}

fn hex(bytes: &[u8]) -> String {
    ContentHash::of(bytes).to_string()
}

/// Any name that follows from the content will do for this server.
fn git_oid(bytes: &[u8]) -> String {
    hex(bytes)[..40].to_string()
}

struct Place {
    folder: tempfile::TempDir,
    branches: Vec<(String, Vec<PushFile>)>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let branches = (["gptq-4bit-32g-actorder_True", "main", "other/name"]
            .into_iter()
            .zip(1u8..))
        .map(|(branch, seed)| {
            let weights = vec![seed; 5000];
            let path = folder.path().join(format!("{seed}"));
            std::fs::write(&path, &weights).unwrap();
            (branch.to_string(), files(branch, path, &weights))
        })
        .collect();
        Place { folder, branches }
    }

    fn push(&self, hub: &Hub, token: Option<&str>, update: bool) -> Result<Vec<Pushed>, HubError> {
        let push = Push {
            repo: REPO,
            private: false,
            update,
            branches: self.branches.clone(),
            message: "Upload",
        };
        let options = hub.options(token, self.folder.path());
        let pushed = push_branches(&push, &options, &mut |_, done, all| assert!(done <= all))?;
        Ok(pushed.into_iter().map(|(_, what)| what).collect())
    }
}

fn files(branch: &str, path: PathBuf, weights: &[u8]) -> Vec<PushFile> {
    let inline = |path: &str, text: String| PushFile {
        path: path.to_string(),
        size: text.len() as u64,
        content: PushContent::Inline {
            git_oid: git_oid(text.as_bytes()),
            bytes: text.into_bytes(),
        },
    };
    vec![
        inline(".gitattributes", "*.safetensors filter=lfs\n".to_string()),
        inline("README.md", format!("# {branch}\n")),
        PushFile {
            path: "model.safetensors".to_string(),
            size: weights.len() as u64,
            content: PushContent::Object {
                file: path,
                oid: ContentHash::of(weights),
            },
        },
    ]
}

const SENT: Pushed = Pushed::Committed { objects: 1 };

#[test]
fn branches_arrive_whole_and_are_not_sent_twice() {
    let (hub, place) = (Hub::new(), Place::new());
    assert_eq!(
        place.push(&hub, Some(TOKEN), false).unwrap(),
        [SENT, SENT, SENT]
    );
    hub.set(|state| {
        assert_eq!(state.branches.len(), 3);
        let main = &state.branches["main"];
        let names: Vec<&String> = main.keys().collect();
        assert_eq!(names, [".gitattributes", "README.md", "model.safetensors"]);
        assert!(matches!(&main["README.md"], Stored::Inline(text) if text == b"# main\n"));
        assert!(
            matches!(&main["model.safetensors"], Stored::Object(oid) if *oid == hex(&[2; 5000]))
        );
        assert!(state.branches.contains_key("other/name"));
        state.requests.clear();
    });
    let again = place.push(&hub, Some(TOKEN), false).unwrap();
    assert!(again.iter().all(|pushed| *pushed == Pushed::AlreadyThere));
    hub.set(|state| {
        let sent = |request: &String| request.contains("/store/") || request.contains("/commit/");
        assert!(!state.requests.iter().any(sent), "{:?}", state.requests);
    });
}

#[test]
fn an_upload_that_broke_half_way_is_resumed() {
    let (hub, place) = (Hub::new(), Place::new());
    hub.set(|state| state.break_at = Some(2));
    let error = place.push(&hub, Some(TOKEN), false).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot upload `model.safetensors`"),
        "{error}"
    );
    assert!(!error.to_string().contains('\n') && !error.to_string().contains(TOKEN));
    assert!(error.hint().unwrap().contains("goes on"));
    hub.set(|state| {
        assert_eq!((state.objects.len(), state.branches["main"].len()), (1, 1));
        state.break_at = None;
        state.puts = 0;
    });
    let pushed = place.push(&hub, Some(TOKEN), false).unwrap();
    assert_eq!(pushed, [Pushed::AlreadyThere, SENT, SENT]);
    hub.set(|state| assert_eq!(state.puts, 2, "the first object was sent again"));
}

#[test]
fn large_objects_go_in_parts() {
    let (hub, place) = (Hub::new(), Place::new());
    hub.set(|state| state.chunk = Some(2048));
    assert_eq!(
        place.push(&hub, Some(TOKEN), false).unwrap(),
        [SENT, SENT, SENT]
    );
    hub.set(|state| {
        assert_eq!(state.parts.len(), 9);
        assert_eq!(state.objects[&hex(&[1; 5000])], vec![1; 5000]);
    });
}

#[test]
fn a_branch_with_other_files_is_replaced_only_when_asked() {
    let (hub, mut place) = (Hub::new(), Place::new());
    place.push(&hub, Some(TOKEN), false).unwrap();
    let other = place.folder.path().join("other");
    std::fs::write(&other, [9; 100]).unwrap();
    place.branches[1].1 = files("changed", other, &[9; 100]);
    place.branches[1].1.remove(1);
    hub.set(|state| state.requests.clear());
    let error = place.push(&hub, Some(TOKEN), false).unwrap_err();
    assert!(
        matches!(&error, HubError::BranchTaken { branch, .. } if branch == "main"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("--update"));
    hub.set(|state| assert!(!state.requests.iter().any(|r| r.contains("/store/"))));
    let pushed = place.push(&hub, Some(TOKEN), true).unwrap();
    assert_eq!(pushed, [Pushed::AlreadyThere, SENT, Pushed::AlreadyThere]);
    hub.set(|state| {
        let names: Vec<&String> = state.branches["main"].keys().collect();
        assert_eq!(names, [".gitattributes", "model.safetensors"]);
    });
}

#[test]
fn what_the_hub_refuses_is_one_line_without_the_token() {
    let (hub, place) = (Hub::new(), Place::new());
    let error = place.push(&hub, Some("hf_wrong"), false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the hub does not let this token make repository `me/model-GPTQ` (status 401): Invalid token"
    );
    assert!(error.hint().unwrap().contains("HF_TOKEN"));
    hub.set(|state| state.full = true);
    let error = place.push(&hub, Some(TOKEN), false).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("(status 403): Private repository storage limit reached"),
        "{text}"
    );
    assert!(!text.contains(TOKEN));
    let error = place.push(&hub, None, false);
    if std::env::var_os("HF_TOKEN").is_none() {
        assert!(matches!(error.unwrap_err(), HubError::NoToken));
    }
}
