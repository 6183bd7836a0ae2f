//! The HTTP pages: read-only, and never in the way of relaying.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How often old samples of the histograms are folded away.
const UPKEEP: Duration = Duration::from_secs(5);

/// What the pages show.
#[derive(Clone)]
pub struct Pages {
    /// The metrics.
    pub metrics: PrometheusHandle,
}

/// Serves the pages until `stop`. An address that cannot be had is said, and the relay goes on without pages.
pub async fn serve(address: SocketAddr, pages: Pages, stop: CancellationToken) {
    let listener = match TcpListener::bind(address).await {
        Ok(listener) => listener,
        Err(error) => {
            warn!(
                %address, %error,
                "http.listen {address} cannot be listened on: there are no pages. Give another address (http.listen, PORT), or \
                 \"off\""
            );
            return;
        }
    };
    info!(%address, "Pages: http://{address}/metrics");
    let upkeep = pages.metrics.clone();
    let router = Router::new().route("/metrics", get(move || metrics(pages.metrics.clone())));
    let serving = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
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

async fn metrics(handle: PrometheusHandle) -> ([(axum::http::HeaderName, &'static str); 1], String) {
    // The version of the text format: https://prometheus.io/docs/instrumenting/exposition_formats.
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], handle.render())
}
