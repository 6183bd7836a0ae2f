//! Relays escrow events.
