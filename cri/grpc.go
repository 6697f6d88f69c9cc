package cri

import (
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// maxMessage is the most one message may hold, either way: what kubelet's
	// client accepts.
	maxMessage = 16 << 20
	// maxStreams bounds the RPCs that one connection may have open; gRPC
	// clients queue further ones.
	maxStreams = 1024
	// minPing is how often a client may ping at most.
	minPing = 5 * time.Second
	// handshakeTimeout ends connections that say nothing.
	handshakeTimeout = 10 * time.Second
)

// NewGRPCServer makes the gRPC server that serves s. Each server belongs to
// one listener, made by Listen.
func NewGRPCServer(s *Server, more ...grpc.ServerOption) *grpc.Server {
	opts := append([]grpc.ServerOption{
		grpc.UnaryInterceptor(s.unary),
		grpc.StreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
	}, more...)
	g := grpc.NewServer(opts...)
	criv1.RegisterRuntimeServiceServer(g, s)
	criv1.RegisterImageServiceServer(g, s)
	return g
}
