// Google's own in-memory Pub/Sub server, pstest, on a port of its own: the tests run against it, too.
//
// Built from Debian's packages (.ci/pstest does it):
//
//	GO111MODULE=off GOPATH=/usr/share/gocode go build -o pstest tests/pstest/main.go
package main

import (
	"flag"
	"fmt"
	"log"
	"net"

	"cloud.google.com/go/pubsub/pstest"
	pb "google.golang.org/genproto/googleapis/pubsub/v1"
	"google.golang.org/grpc"
)

// What Google's takes is 10 MB, grpc's default is 4.
const maxMessageBytes = 32 << 20

func main() {
	listen := flag.String("listen", "127.0.0.1:0", "where to listen; port 0 takes a free one")
	flag.Parse()

	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	// The package's own constructor takes neither a port nor a size: its service is put on a server of ours.
	inner := pstest.NewServer()
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessageBytes), grpc.MaxSendMsgSize(maxMessageBytes))
	pb.RegisterPublisherServer(server, &inner.GServer)
	pb.RegisterSubscriberServer(server, &inner.GServer)
	fmt.Println("listening on", listener.Addr())
	log.Fatal(server.Serve(listener))
}
