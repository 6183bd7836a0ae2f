//! The network between the relayer and a server.

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Forwards connections to a server; those that are cut are never heard of again: no end, no reset.
pub struct Wire {
    port: u16,
    /// The first connection that is whole.
    whole_from: watch::Sender<usize>,
    /// How many there were.
    opened: watch::Receiver<usize>,
    accepting: JoinHandle<()>,
}

impl Wire {
    pub async fn to(server: String) -> Wire {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let port = listener.local_addr().expect("it has an address").port();
        let (whole_from, (opening, opened)) = (watch::Sender::new(0), watch::channel(0));
        let cuts = whole_from.clone();
        let accepting = tokio::spawn(async move {
            for number in 0.. {
                let (mut near, _) = listener.accept().await.expect("connections can be accepted");
                let mut far = TcpStream::connect(&server).await.expect("the server is there");
                opening.send_replace(number + 1);
                let mut cut = cuts.subscribe();
                tokio::spawn(async move {
                    let cut = async { cut.wait_for(|whole_from| number < *whole_from).await.is_ok() };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        true = cut => std::future::pending().await,
                    }
                });
            }
        });
        Wire { port, whole_from, opened, accepting }
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// How many connections there were.
    pub fn opened(&self) -> usize {
        *self.opened.borrow()
    }

    /// Cuts the connections there are.
    pub fn cut(&self) {
        self.cut_first(self.opened());
    }

    /// Cuts so many of them, the oldest.
    pub fn cut_first(&self, connections: usize) {
        self.whole_from.send_replace(connections);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}
