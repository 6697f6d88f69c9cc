package main

import (
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/naru-project/naru/cmd/shim/doctor"
	"github.com/naru-project/naru/internal/config"
)

func doctorCommand(o *options) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor",
		Short: "Look at this host: what it lacks for running pods, and what follows",
		Long: `Look at this host and say of each thing that pods need whether it is there (OK),
unusual (WARN) or missing (FAIL), and what follows. Nothing is changed. It needs
root to see everything. The exit code is 1 when something FAILs.`,
		Example: `  naru doctor
  naru doctor --json | jq '.[] | select(.status != "OK")'`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			cfg, err := o.load()
			if err != nil {
				return err
			}
			results := doctor.Run(c.Context(), doctorConfig(cfg))
			if asJSON {
				if err := printJSON(c.OutOrStdout(), results); err != nil {
					return err
				}
			} else {
				printResults(c.OutOrStdout(), results)
			}
			if doctor.Worst(results) == doctor.Fail {
				return silentError{}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return c
}

func doctorConfig(cfg *config.Config) doctor.Config {
	dirs := []string{cfg.Network.CNI.ConfDir}
	for _, name := range slices.Sorted(maps.Keys(cfg.Network.CNI.HandlerConfDirs)) {
		dirs = append(dirs, cfg.Network.CNI.HandlerConfDirs[name])
	}
	handlers := map[string]string{}
	for name, h := range cfg.Handlers {
		if h.Kind == "oci" {
			handlers[name] = h.Path
		}
	}
	return doctor.Config{
		Handlers: handlers,
		Root:     cfg.Root, Run: cfg.Run, Socket: cfg.Socket, CgroupDriver: cfg.Cgroup.Driver, Table: cfg.Network.Table,
		Plugin: cfg.Network.Plugin, CNIDirs: dirs, CNIBinDirs: cfg.Network.CNI.BinDirs, CNIState: filepath.Join(cfg.Root, "cni"),
		UserNS:  cfg.Runtime.UserNamespaces,
		Monitor: func() (string, error) { return monitorBinary(cfg.Runtime.Monitor) },
		Holder:  []string{"/proc/self/exe", "hold"},
	}
}

func printResults(w io.Writer, results []doctor.Result) {
	count := map[doctor.Status]int{}
	for _, r := range results {
		count[r.Status]++
		fmt.Fprintf(w, "%-4s  %-17s %s\n", r.Status, r.Name, clean(r.Detail))
		if r.Follows != "" {
			fmt.Fprintf(w, "%23s → %s\n", "", clean(r.Follows))
		}
	}
	fmt.Fprintf(w, "\n%d OK, %d WARN, %d FAIL\n", count[doctor.OK], count[doctor.Warn], count[doctor.Fail])
}
