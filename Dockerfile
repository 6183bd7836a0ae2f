# The relayer as an image: `gcloud run deploy --source .` and `docker build .` both take it.
#
# Nothing here needs BuildKit. What is downloaded and compiled for the dependencies is a layer of its own, which only a
# change of Cargo.toml or Cargo.lock makes anew. Both stages are Debian 12, so that the C library is the same.

FROM rust:1.95-slim-bookworm AS builder
WORKDIR /build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The dependencies. Cargo wants the targets that Cargo.toml names to be there, so each is an empty file for the time being;
# the crate's own stubs are cleaned away, lest they count as newer than its sources. The C compiler (aws-lc, mimalloc) is
# part of the base image.
COPY Cargo.toml Cargo.lock ./
RUN mkdir src benches \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && sed -n '/^\[\[bench\]\]/,/^name/s|^name = "\(.*\)"|benches/\1.rs|p' Cargo.toml | xargs touch \
    && cargo build --release --locked --bin relayer \
    && cargo clean --release --package relayer \
    && rm -r src

# The relayer itself.
COPY src src
RUN cargo build --release --locked --bin relayer

# glibc, libgcc and the CA certificates that TLS to the node and to Google is checked with: no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=builder /build/target/release/relayer /usr/local/bin/relayer

# The pages listen on 0.0.0.0:$PORT: in a container nobody could reach 127.0.0.1. Cloud Run sets the variable, too.
ENV PORT=8080
EXPOSE 8080

# Where a relative storage.path ends up. Mount a disk with locks there, or set storage.path to where one is: what is
# written into the container itself is gone with it.
WORKDIR /home/nonroot
# The number of the base image's user `nonroot`: as a name, Kubernetes cannot tell that it is not root.
USER 65532

# The relayer drains what is under way and stops within 8 s; Cloud Run kills after 10.
STOPSIGNAL SIGTERM
ENTRYPOINT ["relayer"]
