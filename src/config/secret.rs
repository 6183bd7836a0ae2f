//! URLs that carry keys, and how they may be shown.

use std::fmt;

use reqwest::Url;

/// A URL whose user info, path and query may hold a key.
///
/// `Debug` and `Display` show scheme, host and port only; [`SecretUrl::expose`] gives the whole.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SecretUrl(Url);

impl SecretUrl {
    /// Wraps `url`.
    pub fn new(url: Url) -> Self {
        Self(url)
    }

    /// The whole URL, for the client that connects to it and for nothing that is printed.
    pub fn expose(&self) -> &Url {
        &self.0
    }

    fn hides_something(&self) -> bool {
        let url = &self.0;
        !matches!(url.path(), "" | "/")
            || url.query().is_some()
            || url.fragment().is_some()
            || !url.username().is_empty()
            || url.password().is_some()
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.0.host_str().unwrap_or_default();
        write!(f, "{}://{host}", self.0.scheme())?;
        if let Some(port) = self.0.port() {
            write!(f, ":{port}")?;
        }
        if self.hides_something() {
            f.write_str("/…")?;
        }
        Ok(())
    }
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `text` as it may be shown where it is, or should have been, a URL.
pub(super) fn hide(text: &str) -> String {
    match Url::parse(text) {
        Ok(url) if url.has_host() => SecretUrl(url).to_string(),
        _ => "(hidden)".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_scheme_host_and_port_are_shown() {
        for (url, shown) in [
            ("https://rpc.example/v2/KEY", "https://rpc.example/…"),
            ("https://KEY:KEY@rpc.example:8545", "https://rpc.example:8545/…"),
            ("wss://rpc.example?key=KEY", "wss://rpc.example/…"),
            ("https://rpc.example/#KEY", "https://rpc.example/…"),
            ("http://127.0.0.1:8545", "http://127.0.0.1:8545"),
            ("http://[::1]:8545/", "http://[::1]:8545"),
        ] {
            let secret = SecretUrl::new(Url::parse(url).unwrap());
            assert_eq!(secret.to_string(), shown);
            assert_eq!(format!("{secret:?}"), shown);
            assert_eq!(secret.expose().as_str(), Url::parse(url).unwrap().as_str());
        }
    }

    #[test]
    fn what_is_not_a_url_is_not_shown_at_all() {
        for text in ["rpc.example/v2/KEY", "localhost:8545", "KEY", ""] {
            assert_eq!(hide(text), "(hidden)", "{text}");
        }
    }
}
