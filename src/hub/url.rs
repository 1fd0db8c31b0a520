//! Addresses: which may be asked, where a redirect leads, and who may see the token.

use std::net::IpAddr;

use ureq::http::Uri;

/// An http or https address without user and password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url(Uri);

impl Url {
    /// Reads an absolute address. The reason of a refusal does not repeat it: it may hold a secret.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let uri: Uri = text
            .parse()
            .map_err(|_| "this is not an address".to_owned())?;
        let authority = uri.authority().map(|a| a.as_str().to_owned());
        match (uri.scheme_str(), authority) {
            (Some("http" | "https"), Some(authority)) if authority.contains('@') => {
                Err("an address with a user or password in it is not used".to_owned())
            }
            (Some("http" | "https"), Some(_))
                if uri.host().is_some_and(|host| !host.is_empty()) =>
            {
                Ok(Self(uri))
            }
            (Some(scheme), Some(_)) => Err(format!("{scheme} is not http or https")),
            _ => Err("this is not an http or https address".to_owned()),
        }
    }

    /// Where `location` leads from here.
    pub(super) fn join(&self, location: &str) -> Result<Self, String> {
        let scheme = self.0.scheme_str().unwrap_or("https");
        let authority = self.0.authority().map_or("", |a| a.as_str());
        let (before_query, _) = location.split_once('?').unwrap_or((location, ""));
        let next = if before_query.contains(':') && !location.starts_with('/') {
            Self::parse(location)?
        } else if location.starts_with("//") {
            Self::parse(&format!("{scheme}:{location}"))?
        } else if location.starts_with('/') {
            Self::parse(&format!("{scheme}://{authority}{location}"))?
        } else {
            let folder = self
                .0
                .path()
                .rsplit_once('/')
                .map_or("", |(folder, _)| folder);
            Self::parse(&format!("{scheme}://{authority}{folder}/{location}"))?
        };
        if scheme == "https" && next.0.scheme_str() != Some("https") {
            return Err("it leads from https to http, where anybody could read along".to_owned());
        }
        if next.is_private() && !self.is_private() {
            return Err(format!(
                "it leads to {}, an address inside this network",
                next.host()
            ));
        }
        Ok(next)
    }

    /// The host's name.
    pub(super) fn host(&self) -> &str {
        self.0.host().unwrap_or("")
    }

    /// Whether scheme, host and port are the same: only then may it see what the other may see.
    pub(super) fn same_origin(&self, other: &Self) -> bool {
        let port = |url: &Self| {
            let default = if url.0.scheme_str() == Some("http") {
                80
            } else {
                443
            };
            url.0.port_u16().unwrap_or(default)
        };
        self.0.scheme_str() == other.0.scheme_str()
            && self.host().eq_ignore_ascii_case(other.host())
            && port(self) == port(other)
    }

    /// For the HTTP client.
    pub(super) fn uri(&self) -> Uri {
        self.0.clone()
    }

    /// Whether the host is this machine.
    pub(super) fn is_here(&self) -> bool {
        let host = self.host();
        let address = host.trim_matches(['[', ']']).parse::<IpAddr>();
        host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|ip| ip.is_loopback())
    }

    /// Whether the host is written as one of this machine or this network.
    fn is_private(&self) -> bool {
        let host = self.host().to_ascii_lowercase();
        if host == "localhost" || host.ends_with(".localhost") || host.ends_with(".local") {
            return true;
        }
        let Ok(address) = host.trim_matches(['[', ']']).parse::<IpAddr>() else {
            // 2130706433 and 0x7f.1 are ways to write 127.0.0.1 that resolvers understand; no name ends in a number
            let last = host.rsplit('.').next().unwrap_or("");
            return last.starts_with(|c: char| c.is_ascii_digit());
        };
        match address.to_canonical() {
            IpAddr::V4(ip) => {
                ip.is_loopback() || ip.is_private() || ip.is_link_local() || ip.is_unspecified()
            }
            IpAddr::V6(ip) => {
                ip.is_loopback()
                    || ip.is_unspecified()
                    || ip.is_unique_local()
                    || ip.is_unicast_link_local()
            }
        }
    }
}

impl std::fmt::Display for Url {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A path's or a revision's name within an address; slashes stay where `keep` has them.
pub(super) fn encode(text: &str, keep: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        let c = char::from(byte);
        if byte.is_ascii_alphanumeric() || "-._~".contains(c) || keep.contains(c) {
            out.push(c);
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn redirects_lead_where_they_should() {
        let from = Url::parse("https://hub.example/a/b?c=d").unwrap();
        for (location, to) in [
            (
                "https://cdn.example/x?y=http://z",
                "https://cdn.example/x?y=http://z",
            ),
            ("//cdn.example/x", "https://cdn.example/x"),
            ("/x?a=b:c", "https://hub.example/x?a=b:c"),
            ("x", "https://hub.example/a/x"),
        ] {
            assert_eq!(from.join(location).unwrap().to_string(), to, "{location}");
        }
        for location in [
            "file:///etc/passwd",
            "ftp://x.example/",
            "http://hub.example/x",
            "https://u:p@x.example/",
            "javascript:alert(1)",
            "https://169.254.169.254/x",
            "https://127.0.0.1/",
            "https://localhost:1/",
            "https://10.1.2.3/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://192.168.1.1/",
            "https://0.0.0.0/",
            "https://a.localhost/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://[fd00::1]/",
        ] {
            assert!(from.join(location).is_err(), "{location}");
        }
        // a mirror in one's own network may lead to another place in it
        let inside = Url::parse("http://127.0.0.1:1/a").unwrap();
        assert!(inside.join("http://localhost:2/b").is_ok());
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let url = |text: &str| Url::parse(text).unwrap();
        let hub = url("https://hub.example/a");
        assert!(hub.same_origin(&url("https://HUB.example:443/b")));
        for other in [
            "https://hub.example:444/a",
            "http://hub.example:443/a",
            "https://x.hub.example/a",
            "https://hub.example.evil/a",
        ] {
            assert!(!hub.same_origin(&url(other)), "{other}");
        }
        assert_eq!(encode("a b/ü#?%.x", "/"), "a%20b/%C3%BC%23%3F%25.x");
        assert_eq!(encode("refs/pr/1", ""), "refs%2Fpr%2F1");
    }
}
