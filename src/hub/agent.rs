//! How connections are made: timeouts, certificates, the proxy; and what is said when there is none.

use std::path::Path;
use std::sync::Arc;

use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, Proxy};

use super::refusal::Failure;
use super::settings::Settings;
use super::url::Url;
use crate::checkpoint::printable;
use crate::error::{Error, Result};

/// What makes connections for these settings. Redirects are not followed, statuses are no errors.
pub(super) fn agent(settings: &Settings, endpoint: &Url) -> Result<Agent> {
    let timeout = Some(settings.timeout);
    let roots = match &settings.certificates {
        Some(path) => RootCerts::Specific(Arc::new(certificates(path)?)),
        None => RootCerts::WebPki,
    };
    // a mirror on this machine is not behind the proxy that the environment names
    let proxy = Proxy::try_from_env().filter(|_| !endpoint.is_here());
    let config = Agent::config_builder()
        .tls_config(TlsConfig::builder().root_certs(roots).build())
        .proxy(proxy)
        .user_agent(concat!("sd-rs/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_resolve(timeout)
        .timeout_connect(timeout)
        .timeout_send_request(timeout)
        .timeout_recv_response(timeout)
        .timeout_per_read(timeout)
        .build();
    Ok(config.new_agent())
}

/// No answer at all.
pub(super) fn unreached(settings: &Settings, url: &Url, error: &ureq::Error) -> Failure {
    let host = printable(url.host());
    let unknown = || "its name is not known; is there a connection?".to_owned();
    let reason = match error {
        ureq::Error::HostNotFound => unknown(),
        ureq::Error::Timeout(_) => {
            let seconds = settings.timeout.as_secs_f64();
            format!("it did not answer within {seconds} s")
        }
        ureq::Error::Rustls(e) => return untrusted(&host, &e.to_string()),
        // what rustls says of a certificate comes through the stream's own errors
        ureq::Error::Io(e) if e.kind() == std::io::ErrorKind::InvalidData => {
            return untrusted(&host, &e.to_string());
        }
        ureq::Error::Io(e) if e.to_string().contains("lookup address") => unknown(),
        ureq::Error::Io(e) => printable(&e.to_string()),
        other => printable(&other.to_string()),
    };
    let text =
        format!("{host} cannot be reached: {reason}; HF_HUB_OFFLINE=1 works with what is here");
    Failure::Passing(Error::Network(text), None)
}

/// A certificate that is not good does not become better by asking again.
fn untrusted(host: &str, reason: &str) -> Failure {
    Failure::Final(Error::Network(format!(
        "{host} cannot be trusted: {}; behind a proxy that reads along, let SSL_CERT_FILE name its certificates",
        printable(reason)
    )))
}

/// The certificates that are trusted, from a file in PEM form.
fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let text = std::fs::read(path).map_err(|e| Error::disk(path, "read", e))?;
    let found: Vec<Certificate<'static>> = parse_pem(&text)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        let reason = "SSL_CERT_FILE names it, and it holds no certificate in PEM form";
        return Err(Error::bad_model(path, reason));
    }
    Ok(found)
}
