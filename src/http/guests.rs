//! Connections of whoever looks at the pages: bounded in number and in time, so that nobody can keep others out.

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};

/// How long a connection may take for its request and the answer.
const STAY: Duration = Duration::from_secs(10);
/// How many there may be; one more, and the oldest has to go.
const SEATS: usize = 64;
/// How long to wait when a connection cannot be accepted, which is mostly for want of file descriptors.
const NO_SEAT: Duration = Duration::from_millis(100);

/// Takes in connections.
pub(super) struct Guests {
    listener: TcpListener,
    /// Of each connection: whether it has gone, and how to send it away. The oldest first.
    seated: VecDeque<(CancellationToken, CancellationToken)>,
}

impl Guests {
    pub fn at(listener: TcpListener) -> Self {
        Self { listener, seated: VecDeque::new() }
    }

    fn seat(&mut self, stream: TcpStream) -> Guest {
        self.seated.retain(|(gone, _)| !gone.is_cancelled());
        if self.seated.len() >= SEATS
            && let Some((_, leave)) = self.seated.pop_front()
        {
            leave.cancel();
        }
        let (gone, leave) = (CancellationToken::new(), CancellationToken::new());
        self.seated.push_back((gone.clone(), leave.clone()));
        let end = async move {
            tokio::select! {
                () = tokio::time::sleep(STAY) => {}
                () = leave.cancelled() => {}
            }
        };
        Guest { stream, end: Some(Box::pin(end)), _gone: gone.drop_guard() }
    }
}

impl Listener for Guests {
    type Io = Guest;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Guest, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok((stream, address)) => return (self.seat(stream), address),
                Err(_) => tokio::time::sleep(NO_SEAT).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// One connection, until its end.
pub(super) struct Guest {
    stream: TcpStream,
    /// `None`: it has come.
    end: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _gone: DropGuard,
}

impl Guest {
    /// The stream, as long as the connection may be there.
    fn stream(&mut self, cx: &mut Context<'_>) -> io::Result<Pin<&mut TcpStream>> {
        if self.end.as_mut().is_none_or(|end| end.as_mut().poll(cx).is_ready()) {
            self.end = None;
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(Pin::new(&mut self.stream))
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_read(cx, buffer)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream(cx)?.poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream(cx)?.poll_shutdown(cx)
    }
}
