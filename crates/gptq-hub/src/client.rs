//! Requests to the hub: unencoded bytes, timeouts, redirects, errors worth a retry.
//!
//! Every request has `Accept-Encoding: identity`. Redirects are followed here rather than by the
//! HTTP library, because the hub sends a large file's hash with a redirect, and because the login
//! may go to the hub's own host only.

use std::cell::Cell;
use std::io;
use std::thread::sleep;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ureq::Agent;
use ureq::Body;
use ureq::http::{HeaderMap, Response};

use crate::resolve::{Patience, Settings};

const CONNECT_SECONDS: u64 = 30;
const MOST_REDIRECTS: usize = 10;
/// However much arrives in between.
const MOST_TRIES: u32 = 50;
/// A hub that asks for more is not waited for.
const MOST_RETRY_AFTER: Duration = Duration::from_secs(120);

/// Names and values that a request sends.
pub(crate) type Headers = Vec<(&'static str, String)>;

/// Why one try did not succeed.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The answer is final.
    Status(u16),
    /// May be otherwise the next time; with what the hub asks to wait.
    Passing(String, Option<Duration>),
    /// Trying again would not help.
    Lasting(String),
    /// This machine's own.
    Disk(&'static str, io::Error),
}

/// The last answer of a chain of redirects.
pub(crate) struct Answer {
    pub response: Response<Body>,
    /// Headers on the file from the hub's own answers.
    pub said: Said,
}

/// Headers of the hub that describe a file; the first answer that has one wins.
#[derive(Clone, Debug, Default)]
pub(crate) struct Said {
    /// `X-Linked-Etag`: the sha256 of a large file.
    pub linked_etag: Option<String>,
    pub linked_size: Option<u64>,
    pub etag: Option<String>,
    pub commit: Option<String>,
}

/// A hub's HTTP client.
pub(crate) struct Client {
    agent: Agent,
    address: String,
    authorization: Option<String>,
    patience: Patience,
    /// Something answered once: from then on it is worth waiting for.
    answered: Cell<bool>,
}

impl Client {
    pub(crate) fn new(settings: &Settings) -> Self {
        let silence = Some(settings.patience.silence);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .accept_encoding("identity")
            .user_agent(concat!("gptq-rs/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(Duration::from_secs(CONNECT_SECONDS)))
            .timeout_recv_response(silence)
            .timeout_per_read(silence)
            .build();
        let login = settings.endpoint.login.as_ref();
        let basic = login.map(|login| format!("Basic {}", STANDARD.encode(login)));
        let bearer = settings.token.as_ref();
        Client {
            agent: config.into(),
            address: settings.endpoint.address.clone(),
            // as Python's `requests` has it: what stands in the address prevails
            authorization: basic.or(bearer.map(|token| format!("Bearer {token}"))),
            patience: settings.patience,
            answered: Cell::new(false),
        }
    }

    /// The address of something below the endpoint; `path` is encoded already.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}/{path}", self.address)
    }

    /// Follows redirects from `url` to an answer of 200, 206 or 416. `headers` is called at every step
    /// with the headers seen so far, and returns those to send.
    pub(crate) fn get(
        &self,
        url: &str,
        headers: &mut dyn FnMut(&Said) -> Result<Headers, Trouble>,
    ) -> Result<Answer, Trouble> {
        let mut url = url.to_string();
        let mut said = Said::default();
        for _ in 0..MOST_REDIRECTS {
            let own = origin(&url) == origin(&self.address);
            let mut request = self.agent.get(&url);
            if let Some(authorization) = self.authorization.as_ref().filter(|_| own) {
                request = request.header("authorization", authorization);
            }
            for (name, value) in headers(&said)? {
                request = request.header(name, value);
            }
            let response = request.call().map_err(|error| self.trouble(&error))?;
            self.answered.set(true);
            if own {
                said.add(response.headers());
            }
            match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => url = next_url(&url, response.headers())?,
                200 | 206 | 416 => return Ok(Answer { response, said }),
                408 | 425 | 429 | 500 | 502 | 503 | 504 => {
                    let status = response.status().as_u16();
                    let wait = retry_after(response.headers());
                    return Err(Trouble::Passing(format!("status {status}"), wait));
                }
                status => return Err(Trouble::Status(status)),
            }
        }
        let reason = format!("more than {MOST_REDIRECTS} redirects");
        Err(Trouble::Lasting(reason))
    }

    /// Tries until it succeeds, the trouble lasts or the patience ends. `done` tells how far it got:
    /// a try that got further does not count. An address where nothing ever answered is tried twice.
    pub(crate) fn persist<T>(
        &self,
        mut attempt: impl FnMut() -> Result<T, Trouble>,
        done: impl Fn() -> u64,
    ) -> Result<T, Trouble> {
        let (mut vain, mut reached) = (0, done());
        for tries in 1.. {
            let (reason, wait) = match attempt() {
                Err(Trouble::Passing(reason, wait)) => (reason, wait),
                other => return other,
            };
            if done() > reached {
                (vain, reached) = (0, done());
            }
            let most = match self.answered.get() {
                true => self.patience.retries,
                false => self.patience.retries.min(1),
            };
            if vain >= most || tries >= MOST_TRIES {
                return Err(Trouble::Lasting(format!(
                    "gave up after {tries} tries: {reason}"
                )));
            }
            let pause = self.patience.first_wait * 2u32.pow(vain);
            vain += 1;
            match wait {
                Some(wait) if wait > MOST_RETRY_AFTER => {
                    let seconds = wait.as_secs();
                    let reason = format!("{reason}, and the hub asks to wait {seconds} s");
                    return Err(Trouble::Lasting(reason));
                }
                wait => sleep(wait.unwrap_or(pause)),
            }
        }
        unreachable!("the loop has no end of its own")
    }

    /// In words, without an address: that of a redirect holds a signature.
    pub(crate) fn trouble(&self, error: &ureq::Error) -> Trouble {
        let passing = |reason: String| Trouble::Passing(reason, None);
        match error {
            ureq::Error::Io(error) => self.broken(error),
            ureq::Error::Timeout(_) => passing(self.silent()),
            ureq::Error::HostNotFound => passing("the host is not found".into()),
            ureq::Error::ConnectionFailed => passing("connection failed".into()),
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => {
                Trouble::Lasting("the address is not one of HTTP".into())
            }
            other => passing(one_line(&other.to_string())),
        }
    }

    /// Classifies an error while a body is read.
    pub(crate) fn broken(&self, error: &io::Error) -> Trouble {
        let reason = match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => self.silent(),
            _ => one_line(&error.to_string()),
        };
        Trouble::Passing(reason, None)
    }

    fn silent(&self) -> String {
        format!("no answer for {} s", self.patience.silence.as_secs_f32())
    }
}

impl Said {
    fn add(&mut self, headers: &HeaderMap) {
        let text = |name: &str| Some(headers.get(name)?.to_str().ok()?.to_string());
        let etag = |name: &str| text(name).map(|tag| plain_etag(&tag));
        self.linked_etag = self.linked_etag.take().or_else(|| etag("x-linked-etag"));
        self.etag = self.etag.take().or_else(|| etag("etag"));
        self.commit = self.commit.take().or_else(|| text("x-repo-commit"));
        let size = || text("x-linked-size")?.parse().ok();
        self.linked_size = self.linked_size.or_else(size);
    }
}

/// `W/"abc"` and `"abc"` as `abc`.
fn plain_etag(tag: &str) -> String {
    let tag = tag.trim().strip_prefix("W/").unwrap_or(tag.trim());
    tag.trim_matches('"').to_string()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get("retry-after")?.to_str().ok()?;
    Some(Duration::from_secs(seconds.trim().parse().ok()?))
}

/// Scheme, host and port.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']);
    end.map_or(url, |end| &url[..start + end])
}

fn next_url(url: &str, headers: &HeaderMap) -> Result<String, Trouble> {
    let lasting = |reason: &str| Trouble::Lasting(reason.into());
    let location = headers.get("location").and_then(|to| to.to_str().ok());
    let location = location.ok_or_else(|| lasting("a redirect that says not where to"))?;
    let scheme = url.split("://").next().unwrap_or("https");
    if location.starts_with("http://") || location.starts_with("https://") {
        return Ok(location.to_string());
    }
    if let Some(rest) = location.strip_prefix("//") {
        return Ok(format!("{scheme}://{rest}"));
    }
    match location.starts_with('/') {
        true => Ok(format!("{}{location}", origin(url))),
        false => Err(lasting("a redirect to no address of HTTP")),
    }
}

fn one_line(text: &str) -> String {
    gptq_types::outside_name::shown(text, 160).to_lowercase()
}

/// A path of a URL: all but unreserved characters and `/` encoded.
pub(crate) fn encoded(path: &str) -> String {
    let mut encoded = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(char::from(byte));
            }
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_stays_with_its_own_host() {
        assert_eq!(origin("http://h:80/a?b"), "http://h:80");
        assert_eq!(origin("https://h"), "https://h");
        assert_ne!(origin("http://h/"), origin("https://h/"));
        let mut headers = HeaderMap::new();
        headers.insert("location", "/cdn/x".parse().unwrap());
        assert_eq!(
            next_url("http://h:1/a", &headers).unwrap(),
            "http://h:1/cdn/x"
        );
        headers.insert("location", "//other/x".parse().unwrap());
        assert_eq!(
            next_url("https://h/a", &headers).unwrap(),
            "https://other/x"
        );
        headers.insert("location", "file:///etc/passwd".parse().unwrap());
        assert!(next_url("https://h/a", &headers).is_err());
    }

    #[test]
    fn etags_and_paths_lose_and_get_their_marks() {
        assert_eq!(plain_etag("W/\"ab\""), "ab");
        assert_eq!(plain_etag("\"ab\""), "ab");
        assert_eq!(encoded("a b/ä#.json"), "a%20b/%C3%A4%23.json");
    }
}
