//! The address of a hub, apart from the login that may stand in it.

/// The address of the hub and the login for it.
#[derive(Clone)]
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
pub(crate) struct Endpoint {
    /// Scheme, host, port and path; no login, no slash at its end.
    pub address: String,
    /// `user:password` of `https://user:password@host`, as written there.
    pub login: Option<String>,
}

impl Endpoint {
    /// Parses an address. Everything after `?` or `#` is dropped, and everything before the last `@`
    /// counts as a login, since a password with a `/` in it must not be taken for a host.
    pub(crate) fn parse(text: &str) -> Self {
        let text = text.trim();
        let (scheme, rest) = text.split_once("://").unwrap_or(("https", text));
        let (login, rest) = match rest.rsplit_once('@') {
            Some((login, rest)) => (Some(login.to_string()), rest),
            None => (None, rest),
        };
        let end = rest.find(['?', '#']).unwrap_or(rest.len());
        let place = rest[..end].trim_end_matches('/');
        Endpoint {
            address: format!("{scheme}://{place}"),
            login: login.filter(|login| !login.is_empty()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_is_no_part_of_the_address() {
        // `HF_ENDPOINT=http://user:pw@host` was once printed with its password
        for (text, address, login) in [
            ("https://h.co/", "https://h.co", None),
            ("http://u:p@h:8080/hub/", "http://h:8080/hub", Some("u:p")),
            ("http://u:p/w@h", "http://h", Some("u:p/w")),
            ("http://u:p@x@h", "http://h", Some("u:p@x")),
            ("u:p@h", "https://h", Some("u:p")),
            ("http://h/?token=s#t", "http://h", None),
        ] {
            let endpoint = Endpoint::parse(text);
            assert_eq!(endpoint.address, address, "{text}");
            assert_eq!(endpoint.login.as_deref(), login, "{text}");
        }
    }
}
