//! What the ledger says, for people and for tests.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::extract::{Path, State as Shared};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::json;

use crate::consumer::State;

pub fn router(state: Arc<State>) -> Router {
    Router::new().route("/escrows/{address}", get(escrow)).route("/health", get(health)).with_state(state)
}

async fn escrow(Shared(state): Shared<Arc<State>>, Path(address): Path<String>) -> Response {
    let found = state.ledger.lock().expect("no panic while held").escrow(&address);
    match found {
        Ok(Some(escrow)) => Json(escrow).into_response(),
        Ok(None) => {
            let detail = format!("Escrow {address} not found");
            (StatusCode::NOT_FOUND, Json(json!({ "detail": detail }))).into_response()
        }
        Err(error) => failed(&error),
    }
}

async fn health(Shared(state): Shared<Arc<State>>) -> Response {
    let counts = state.ledger.lock().expect("no panic while held").counts();
    match counts {
        Ok(counts) if state.healthy.load(Ordering::Relaxed) => {
            Json(json!({ "status": "ok", "ledger": counts })).into_response()
        }
        Ok(counts) => {
            let body = json!({ "status": "failing", "ledger": counts });
            (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> Response {
    tracing::error!("The database failed: {error:#}");
    let body = json!({ "status": "failing", "detail": "the database failed" });
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}
