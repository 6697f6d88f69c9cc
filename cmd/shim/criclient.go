package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
)

// callTimeout bounds one CRI call of the command line; maxAnswer is large enough
// for the lists of any node.
const (
	callTimeout = 30 * time.Second
	maxAnswer   = 64 << 20
)

// criClient speaks to the daemon as a kubelet does.
type criClient struct {
	socket  string
	conn    *grpc.ClientConn
	runtime criv1.RuntimeServiceClient
	images  criv1.ImageServiceClient
}

// dialCRI connects to the daemon that the command line names.
func dialCRI(o *options) (*criClient, error) {
	socket, err := o.criSocket()
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer)))
	if err != nil {
		return nil, errs.New(errs.Internal, "reach the daemon at %s: %w", socket, err)
	}
	return &criClient{socket: socket, conn: conn, runtime: criv1.NewRuntimeServiceClient(conn), images: criv1.NewImageServiceClient(conn)}, nil
}

func (c *criClient) close() { _ = c.conn.Close() }

// unreachable says why no daemon answers, in place of how gRPC tells it.
func (c *criClient) unreachable(message string) string {
	conn, err := net.DialTimeout("unix", c.socket, time.Second)
	if err == nil {
		_ = conn.Close()
		return clean(message)
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err
	}
	return err.Error()
}

// call bounds fn and words its error for a person.
func call[T any](ctx context.Context, c *criClient, what string, fn func(context.Context) (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	v, err := fn(ctx)
	if err == nil {
		return v, nil
	}
	s := status.Convert(err)
	switch s.Code() {
	case codes.NotFound:
		err = errs.New(errs.NotFound, "%s: %s", what, clean(s.Message()))
	case codes.Unavailable:
		err = errs.New(errs.Unavailable, "%s: the daemon at %s does not answer: %s (is naru running, and are you root?)", what, c.socket, c.unreachable(s.Message()))
	case codes.InvalidArgument:
		err = errs.New(errs.InvalidArgument, "%s: %s", what, clean(s.Message()))
	default:
		err = fmt.Errorf("%s: %s (%s)", what, clean(s.Message()), s.Code())
	}
	return v, err
}
