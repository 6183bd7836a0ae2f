//! The HTTP pages: read-only, and never in the way of relaying.
//!
//! Nobody can hold them up: each connection serves one request, for a bounded time, and where there are too many the
//! oldest makes room. Probes are answered from before the store is open until the process ends.

mod guests;
mod ready;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue,
    REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::json;
use tokio::net::TcpListener;
use tracing::{info, warn};

use crate::status::{Observer, Status};
use crate::telemetry::metrics;
use guests::Guests;
use ready::readiness;

/// The page, whole. `{nonce}` stands where the policy's nonce goes.
const PAGE: &str = include_str!("http/page.html");
/// What there is.
const PATHS: [&str; 5] = ["/", "/healthz", "/readyz", "/status", "/metrics"];
/// How often old samples of the histograms are folded away.
const UPKEEP: Duration = Duration::from_secs(5);
/// A store that takes longer to say how it is counts as failed.
const STORE_PATIENCE: Duration = Duration::from_secs(5);

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    /// The metrics.
    pub metrics: PrometheusHandle,
    /// The relayer.
    pub observer: Arc<Observer>,
}

/// Listens, or says why not: then there are no pages, and the relay goes on without.
pub async fn bind(address: SocketAddr) -> Option<TcpListener> {
    match TcpListener::bind(address).await {
        Ok(listener) => {
            info!(%address, "Pages: http://{address}/");
            Some(listener)
        }
        Err(error) => {
            warn!(
                %address, %error,
                "http.listen {address} cannot be listened on: there are no pages. Give another address (http.listen, PORT), or \
                 \"off\""
            );
            None
        }
    }
}

/// Serves the pages, for ever.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let upkeep = pages.metrics.clone();
    let serving = axum::serve(Guests::at(listener), router(pages));
    tokio::select! {
        served = serving => {
            if let Err(error) = served {
                warn!(%error, "The HTTP pages ended");
            }
        }
        () = fold(upkeep) => {}
    }
}

async fn fold(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(UPKEEP).await;
        metrics.run_upkeep();
    }
}

fn router(pages: Pages) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/healthz", get(health))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .route("/metrics", get(scraped))
        .fallback(nothing)
        .layer(middleware::from_fn(read_only))
        .with_state(pages)
}

/// Nothing but reading, one request a connection, and nothing is kept by anybody in between.
async fn read_only(request: Request, next: Next) -> Response {
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    let mut response = match reads {
        true => next.run(request).await,
        false => {
            let text = "These pages are read-only: GET and HEAD\n";
            (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "GET, HEAD")], text).into_response()
        }
    };
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers
        .entry(CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    response
}

async fn nothing() -> (StatusCode, String) {
    (StatusCode::NOT_FOUND, format!("There is nothing here. Pages: {}\n", PATHS.join(", ")))
}

/// What is in the page may run and be applied, and it may ask us; nothing else.
async fn page() -> ([(HeaderName, String); 2], String) {
    let nonce = nonce();
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [(CONTENT_TYPE, "text/html; charset=utf-8".to_owned()), (CONTENT_SECURITY_POLICY, policy)];
    (headers, PAGE.replace("{nonce}", &nonce))
}

/// Unlike any before: std seeds its hashers from the system.
fn nonce() -> String {
    use std::hash::{BuildHasher, RandomState};
    format!("{:016x}{:016x}", RandomState::new().hash_one(0), RandomState::new().hash_one(1))
}

/// Whether the loops turn.
async fn health(State(pages): State<Pages>) -> (StatusCode, Json<serde_json::Value>) {
    let hanging = pages.observer.vitals().hanging();
    let code = if hanging.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let loops: Vec<_> = hanging
        .iter()
        .map(|(of, silent)| json!({ "loop": of.to_string(), "silent_seconds": silent.as_secs() }))
        .collect();
    (code, Json(json!({ "healthy": hanging.is_empty(), "hanging": loops })))
}

/// Whether it does what is expected of it.
async fn ready(State(pages): State<Pages>) -> (StatusCode, Json<ready::Readiness>) {
    let expected = pages.observer.expectations();
    let readiness = match look(&pages).await {
        Ok(status) => readiness(&status, &expected),
        Err(error) => ready::store_failed(&error),
    };
    let code = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (code, Json(readiness))
}

async fn status(State(pages): State<Pages>) -> Response {
    match look(&pages).await {
        Ok(status) => Json(status).into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, Json(json!({ "error": error }))).into_response(),
    }
}

/// What only changes with time, or is known to the store alone, is measured when it is asked for.
async fn scraped(State(pages): State<Pages>) -> ([(HeaderName, &'static str); 1], String) {
    if let Ok(status) = look(&pages).await {
        measure(&status);
    }
    // The version of the text format: https://prometheus.io/docs/instrumenting/exposition_formats.
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], pages.metrics.render())
}

fn measure(status: &Status) {
    let chain = &status.chain;
    metrics::reading(chain.lag_blocks, chain.head_age_seconds, chain.finalized);
    if let Some(escrows) = &status.escrows {
        metrics::registered([
            ("watched", escrows.watched),
            ("joining", escrows.joining),
            ("archived", escrows.archived),
            ("withdrawn", escrows.withdrawn),
        ]);
    }
    if let Some(events) = &status.events {
        metrics::kept(events.oldest_unpublished_seconds, events.quarantined);
    }
}

/// The status; or, if there is none, why.
async fn look(pages: &Pages) -> Result<Status, String> {
    let observer = Arc::clone(&pages.observer);
    let reading = tokio::task::spawn_blocking(move || observer.status());
    match tokio::time::timeout(STORE_PATIENCE, reading).await {
        Ok(Ok(status)) => status.map_err(|error| error.to_string()),
        Ok(Err(panicked)) => Err(panicked.to_string()),
        Err(_) => Err(format!("the store does not answer within {STORE_PATIENCE:?}")),
    }
}
