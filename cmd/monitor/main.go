// Command naru-monitor supervises the containers of a node.
//
// It is one program in five roles: the keeper, parent of every container; the
// worker, which the keeper starts; the guard, which stands in for an init
// system; the first process of pods that share one PID namespace; and the
// parent of an exec in a container of an OCI runtime. See the packages below
// runtime/monitor for what each does.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/monitor/keeper"
	"github.com/naru-project/naru/runtime/monitor/reaper"
	"github.com/naru-project/naru/runtime/monitor/worker"
)

// version is set by the linker.
var version = "dev"

const usage = `naru-monitor keeps the containers of this node running.

Usage:
  naru-monitor keeper --dir DIR [--kill-on-exit] [--guard]
  naru-monitor version [--protocol]

keeper runs the one supervisor of a node, in the foreground. DIR (for example
/run/naru/monitor) belongs to it alone; it is made if needed, with mode 0700:

  DIR/monitor.sock  where the daemon naru connects; root only
  DIR/exits/ID      how container ID ended, as text, until the daemon deletes it
  DIR/lock          held while a keeper runs

With --guard, for a node without an init system to do it, a second process
stays as the keeper's parent and starts it again when it is killed. It hands
signals on to the keeper and ends with it. The exit status is 3 when another
keeper runs in DIR.

Signals of the keeper:

  SIGTERM  With no living container: end. Otherwise stay, and say so, because
           containers outlive the daemon and are not to be lost by a restart.
           With --kill-on-exit: kill the containers, then end.
  SIGUSR2  Replace the running program, in place, by what the path of this
           binary holds now: first the keeper (same process, same children),
           then the worker. If the new one does not start, the old one stays.
  SIGHUP   Restart the worker. Containers and their logs do not notice; execs
           that run at that moment end.
  SIGKILL  Containers go on, the worker goes on logging, and the next keeper
           takes everything over.

As a systemd unit: Type=exec, Restart=always, KillMode=process,
SendSIGKILL=no, OOMScoreAdjust=-999, Delegate=yes, LimitNOFILE=1048576,
ExecReload=/bin/kill -USR2 $MAINPID.

Other subcommands are for naru-monitor itself: worker (started by the keeper),
pause (first process of a shared PID namespace) and exec (parent of an exec in
a container of an OCI runtime).
`

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "naru-monitor: %v\n", err)
		os.Exit(exitCode(err))
	}
}

func exitCode(err error) int {
	var e *keeper.ExitError
	switch {
	case errors.As(err, &e):
		return e.Status
	case errs.Is(err, errs.AlreadyExists):
		return keeper.ExitBusy
	}
	return 1
}

func run(args []string, out io.Writer) error {
	name := "help"
	if len(args) > 0 {
		name, args = args[0], args[1:]
	}
	switch name {
	case "pause":
		pause()
		return nil
	case "keeper":
		sys.RelaxTimers()
		return runKeeper(args, out)
	case "worker":
		sys.RelaxTimers()
		return worker.Run(version)
	case "exec":
		return reaper.Run(args)
	case "version", "--version":
		if len(args) > 0 && args[0] == "--protocol" {
			_, err := io.WriteString(out, keeper.Protocols())
			return err
		}
		_, err := fmt.Fprintf(out, "naru-monitor %s\n", version)
		return err
	case "help", "--help", "-h":
		_, err := io.WriteString(out, usage)
		return err
	}
	return fmt.Errorf("unknown subcommand %q; try --help", name)
}

func runKeeper(args []string, out io.Writer) error {
	var o keeper.Options
	var guard bool
	f := flag.NewFlagSet("keeper", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&o.Dir, "dir", "", "")
	f.BoolVar(&o.KillOnExit, "kill-on-exit", false, "")
	f.BoolVar(&guard, "guard", false, "")
	f.StringVar(&o.Binary, "binary", "", "") // internal: where the program lies on disk
	f.IntVar(&o.Resume, "resume", 0, "")     // internal: the table of the previous program
	switch err := f.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		_, err = io.WriteString(out, usage)
		return err
	case err != nil:
		return err
	case o.Dir == "" || o.Dir[0] != '/':
		return fmt.Errorf("--dir must name the keeper's folder by an absolute path")
	case f.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", f.Arg(0))
	}
	if o.Resume == 0 && !keeper.Sealed() {
		path, err := os.Readlink("/proc/self/exe")
		if err != nil {
			return err
		}
		return keeper.Reexec(append([]string{"keeper", "--binary", path}, args...))
	}
	if guard {
		return keeper.Guard(o)
	}
	return keeper.Run(o)
}
