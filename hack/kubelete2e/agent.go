package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// agent is what the pods run: a gRPC server with a health service, a writer of
// numbered lines, an eater of memory.
func agent(ctx context.Context, args []string) error {
	signal.Reset(syscall.SIGTERM, syscall.SIGINT) // as the first process of a PID namespace it must ask for its end:
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	go func() {
		<-end
		os.Exit(0)
	}()
	switch {
	case args[0] == "grpc" && len(args) == 2:
		return serveHealth(ctx, args[1])
	case args[0] == "lines" && len(args) == 3:
		count, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		over, err := time.ParseDuration(args[2])
		if err != nil {
			return err
		}
		return writeLines(count, over)
	case args[0] == "eat" && len(args) == 2:
		megabytes, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return eat(megabytes)
	}
	return fmt.Errorf("%q is not a command", args)
}

func serveHealth(ctx context.Context, address string) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return err
	}
	h := health.NewServer()
	h.SetServingStatus("ready", grpc_health_v1.HealthCheckResponse_SERVING)
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, h)
	return s.Serve(l)
}

// writeLines writes count numbered lines, evenly over a duration. Without a
// count it writes ten lines a second for ever.
func writeLines(count int, over time.Duration) error {
	if count == 0 {
		for i := 0; ; i++ {
			if _, err := fmt.Println(i); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	w := bufio.NewWriter(os.Stdout)
	const parts = 1000
	for part := range parts {
		for i := count * part / parts; i < count*(part+1)/parts; i++ {
			fmt.Fprintf(w, "%d of %d, and some words to make the line about as long as lines are\n", i, count)
		}
		if err := w.Flush(); err != nil {
			return err
		}
		time.Sleep(over / parts)
	}
	return nil
}

func eat(megabytes int) error {
	var kept [][]byte
	for range megabytes {
		b := make([]byte, 1<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		kept = append(kept, b)
	}
	_, err := fmt.Printf("ate %d MiB and live\n", len(kept))
	return err
}
