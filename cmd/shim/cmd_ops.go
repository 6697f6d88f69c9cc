package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/naru-project/naru/internal/admin"
)

func opsCommand(o *options) *cobra.Command {
	var output string
	var watch bool
	c := &cobra.Command{
		Use:   "ops",
		Short: "Show what the daemon is doing now: operation, pod, step, age",
		Long: `Show the running changes of pods and containers: what is done, to which pod or
container, in which step it is and for how long. A pod that does not come up is
here with the step that it hangs in.`,
		Example: `  naru ops
  naru ops --watch`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			cli, err := dialAdmin(o)
			if err != nil {
				return err
			}
			return repeat(c.Context(), c.OutOrStdout(), watch, func(ctx context.Context, w io.Writer) error {
				ops, err := cli.Operations(ctx)
				if err != nil {
					return err
				}
				if output == "json" {
					return printJSON(w, ops)
				}
				printOps(w, ops, time.Now())
				return nil
			})
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "again every second, until interrupted")
	outputFlag(c, &output)
	return c
}

func printOps(w io.Writer, ops []admin.Operation, now time.Time) {
	if len(ops) == 0 {
		fmt.Fprintln(w, "nothing is running")
		return
	}
	t := newTable(w, "OPERATION", "OF", "ID", "STEP", "IN STEP", "AGE")
	for _, x := range ops {
		t.row(x.Kind, x.Name, short(x.ID), x.Step, age(now.Sub(x.StepAt)), age(now.Sub(x.Started)))
	}
	t.flush()
}

func dialAdmin(o *options) (*admin.Client, error) {
	socket, err := o.adminSocket()
	if err != nil {
		return nil, err
	}
	return admin.NewClient(socket), nil
}

// repeat calls fn once, or every second until ctx ends.
func repeat(ctx context.Context, w io.Writer, watch bool, fn func(context.Context, io.Writer) error) error {
	if !watch {
		return fn(ctx, w)
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if isTerminal(w) {
			fmt.Fprint(w, "\x1b[H\x1b[2J")
		}
		err := fn(ctx, w)
		if ctx.Err() != nil {
			return nil // interrupted, as --watch is meant to end
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
