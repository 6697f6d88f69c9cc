package cri

import (
	"context"

	"google.golang.org/protobuf/proto"
)

// maxChunk is how many bytes of items go into one message of a streamed list.
const maxChunk = 1 << 20

// sendChunks sends each item exactly once, as many to a message as fit, at
// least one. Nothing is sent for an empty list: the stream just ends.
func sendChunks[T proto.Message](ctx context.Context, items []T, send func([]T) error) error {
	start, size := 0, 0
	for i, item := range items {
		n := proto.Size(item)
		if i > start && size+n > maxChunk {
			if err := sendChunk(ctx, items[start:i], send); err != nil {
				return err
			}
			start, size = i, 0
		}
		size += n
	}
	if start == len(items) {
		return nil
	}
	return sendChunk(ctx, items[start:], send)
}

func sendChunk[T any](ctx context.Context, items []T, send func([]T) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return send(items)
}
