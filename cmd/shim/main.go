// Command naru is the daemon and its command line.
//
// The daemon is "naru serve". The other commands speak CRI to the daemon's
// socket, as crictl does, or, for what CRI has no words for, to its admin
// socket. Exit codes: 0 done, 1 an error, 2 a command line that makes no sense.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/config"
)

// version is set by the build.
var version = "0.1.0-dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	root := newRoot()
	ran, err := root.ExecuteContextC(ctx)
	stop()
	code := exitCode(err)
	if err != nil && !isSilent(err) {
		fmt.Fprintln(root.ErrOrStderr(), "naru:", err)
		if code == exitUsage { // help is one word away
			fmt.Fprintf(root.ErrOrStderr(), "Try: %s --help\n", ran.CommandPath())
		}
	}
	os.Exit(code)
}

// options are the flags of every command.
type options struct {
	config   string
	endpoint string
	admin    string
}

// newRoot assembles the command line.
func newRoot() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:   "naru",
		Short: "A Kubernetes container runtime",
		Long: `naru runs the pods of a Kubernetes node: it answers CRI, the protocol of the
kubelet, on a unix socket. Everything that speaks CRI works with it, crictl
included; the commands here are for what CRI has no words for.`,
		Example: `  naru serve                        run the daemon (normally systemd does)
  naru doctor                       what this host lacks, and what follows
  naru ps                           pods and containers
  naru ops                          what the daemon is doing now, and for how long
  naru image load app.tar           an image without a registry`,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	group(root)
	f := root.PersistentFlags()
	f.StringVar(&o.config, "config", "", "configuration file (default "+config.DefaultPath+", if it is there)")
	f.StringVar(&o.endpoint, "socket", "", "CRI socket of the daemon (default: the configuration's)")
	f.StringVar(&o.endpoint, "endpoint", "", "the same, in crictl's spelling: unix:///run/naru/naru.sock")
	f.StringVar(&o.admin, "admin-socket", "", "admin socket of the daemon (default: admin.sock in the configuration's run folder)")
	_ = f.MarkHidden("endpoint")
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageErrorf("%s: %v", c.CommandPath(), err) })
	root.AddCommand(
		serveCommand(o), psCommand(o), inspectCommand(o), opsCommand(o), imageCommand(o),
		doctorCommand(o), configCommand(o), versionCommand(o), completionCommand(root), holdCommand(),
	)
	return root
}

func serveCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon",
		Long: `Run the daemon until SIGTERM. Pods go on when it ends, and it finds them again
when it starts: stopping, restarting and upgrading it disturbs no container.

It starts naru-monitor, the parent of all containers, when none answers; with
the systemd units the monitor is a service of its own. Under systemd it says
when it is ready and feeds the watchdog.`,
		Example: `  naru serve
  naru serve --config /tmp/try/config.toml    another one beside it: see docs/install.md, "By hand"`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			hup := make(chan os.Signal, 1) // first of all: it would end the process
			signal.Notify(hup, syscall.SIGHUP)
			defer klog.Flush()
			return runServe(c.Context(), o.config, hup)
		},
	}
}

// load reads the configuration that the command line names.
func (o *options) load() (*config.Config, error) { return config.Load(o.config) }

// criSocket is where the daemon serves CRI. A given socket needs no
// configuration.
func (o *options) criSocket() (string, error) {
	if o.endpoint != "" {
		path := strings.TrimPrefix(o.endpoint, "unix://")
		if !strings.HasPrefix(path, "/") {
			return "", usageErrorf("socket %q: want an absolute path or unix:///path", o.endpoint)
		}
		return path, nil
	}
	cfg, err := o.load()
	if err != nil {
		return "", err
	}
	return cfg.Socket, nil
}

// adminSocket is where it serves the rest.
func (o *options) adminSocket() (string, error) {
	if o.admin != "" {
		return strings.TrimPrefix(o.admin, "unix://"), nil
	}
	cfg, err := o.load()
	if err != nil {
		return "", err
	}
	return cfg.AdminSocket(), nil
}
