package main

import (
	"context"
	"fmt"
	"io"
	"os"
	goruntime "runtime"
	"time"

	"github.com/spf13/cobra"

	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
)

func configCommand(o *options) *cobra.Command {
	c := &cobra.Command{
		Use:   "config",
		Short: "The configuration: print the default, check, show, reload",
		Long: `The configuration is one TOML file and a folder config.d with drop-ins beside it.
Every key has a default; a file is needed only for what is to differ.`,
		Example: `  naru config default > /etc/naru/config.toml
  naru config check && naru config reload`,
	}
	group(c)
	var running bool
	show := &cobra.Command{
		Use:   "show",
		Short: "Print the configuration in effect: file, drop-ins and defaults together",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			text, err := shownConfig(c.Context(), o, running)
			if err == nil {
				fmt.Fprint(c.OutOrStdout(), text)
			}
			return err
		},
	}
	show.Flags().BoolVar(&running, "running", false, "that of the running daemon, which may have read older files")
	c.AddCommand(
		&cobra.Command{
			Use:   "default",
			Short: "Print the default configuration, every key with its meaning",
			Args:  noArgs,
			Run:   func(c *cobra.Command, _ []string) { fmt.Fprint(c.OutOrStdout(), config.DefaultFile()) },
		},
		&cobra.Command{
			Use:   "check [FILE]",
			Short: "Check a configuration and its drop-ins",
			Args:  nArgs(0, 1, "at most one FILE"),
			RunE: func(c *cobra.Command, args []string) error {
				path := o.config
				if len(args) == 1 {
					path = args[0]
				}
				if _, err := config.Load(path); err != nil {
					return err
				}
				if path == "" {
					path = config.DefaultPath
					if _, err := os.Stat(path); err != nil {
						path += " (not there: the defaults)"
					}
				}
				fmt.Fprintln(c.OutOrStdout(), clean(path)+": good")
				return nil
			},
		},
		show,
		reloadCommand(o),
	)
	return c
}

func reloadCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the running daemon take the configuration as it is now",
		Long: `Have the running daemon read its configuration file and drop-ins again, and
print what changed. All of it is taken or nothing: a file with a mistake, or a
change that only a restart can bring (see the marks in "naru config default"),
leaves the daemon as it was. SIGHUP does the same; its outcome is in the log.`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cli, err := dialAdmin(o)
			if err != nil {
				return err
			}
			done, err := cli.Reload(c.Context())
			if err != nil {
				return err
			}
			if len(done.Changes) == 0 {
				fmt.Fprintf(c.OutOrStdout(), "%s: nothing changed\n", clean(done.File))
				return nil
			}
			fmt.Fprintf(c.OutOrStdout(), "%s: reloaded\n", clean(done.File))
			for _, ch := range done.Changes {
				fmt.Fprintf(c.OutOrStdout(), "  %s: %s -> %s\n", clean(ch.Key), clean(ch.Old), clean(ch.New))
			}
			return nil
		},
	}
}

func shownConfig(ctx context.Context, o *options, running bool) (string, error) {
	if running {
		cli, err := dialAdmin(o)
		if err != nil {
			return "", err
		}
		return cli.Config(ctx)
	}
	cfg, err := o.load()
	if err != nil {
		return "", err
	}
	return cfg.File()
}

// versions is what "naru version" prints.
type versions struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
	Daemon   string `json:"daemon,omitempty"` // empty = none answers
}

func versionCommand(o *options) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program and of the running daemon",
		Args:  noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			v := versions{Version: version, Go: goruntime.Version(), Platform: goruntime.GOOS + "/" + goruntime.GOARCH}
			if cli, err := dialAdmin(o); err == nil {
				ctx, cancel := context.WithTimeout(c.Context(), 2*time.Second)
				defer cancel()
				if d, err := cli.Version(ctx); err == nil {
					v.Daemon = d.Version
				}
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), v)
			}
			fmt.Fprintf(c.OutOrStdout(), "naru %s (%s, %s)\n", v.Version, v.Go, v.Platform)
			if v.Daemon != "" {
				fmt.Fprintf(c.OutOrStdout(), "daemon %s\n", clean(v.Daemon))
			}
			return nil
		},
	}
	outputFlag(c, &output)
	return c
}

func completionCommand(root *cobra.Command) *cobra.Command {
	shells := map[string]func(io.Writer) error{
		"bash": func(w io.Writer) error { return root.GenBashCompletionV2(w, true) },
		"zsh":  root.GenZshCompletion,
		"fish": func(w io.Writer) error { return root.GenFishCompletion(w, true) },
	}
	return &cobra.Command{
		Use:       "completion bash|zsh|fish",
		Short:     "Print the script that completes naru's commands in a shell",
		ValidArgs: []string{"bash", "zsh", "fish"},
		Example: `  naru completion bash > /etc/bash_completion.d/naru
  source <(naru completion zsh)`,
		Args: nArgs(1, 1, "a shell: bash, zsh or fish"),
		RunE: func(c *cobra.Command, args []string) error {
			gen, ok := shells[args[0]]
			if !ok {
				return usageErrorf("no completion for %q: want bash, zsh or fish", clean(args[0]))
			}
			if err := gen(c.OutOrStdout()); err != nil {
				return errs.New(errs.Internal, "write the completion: %w", err)
			}
			return nil
		},
	}
}

// holdCommand is what doctor starts in a new user namespace to keep that alive
// while it tries something there.
func holdCommand() *cobra.Command {
	return &cobra.Command{
		Use: "hold", Hidden: true, Args: noArgs,
		Run: func(c *cobra.Command, _ []string) { _, _ = io.Copy(io.Discard, c.InOrStdin()) },
	}
}
