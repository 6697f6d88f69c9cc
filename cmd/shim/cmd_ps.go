package main

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// psPod is one pod as "naru ps" shows it.
type psPod struct {
	ID         string        `json:"id"`
	Namespace  string        `json:"namespace"`
	Name       string        `json:"name"`
	State      string        `json:"state"`
	IPs        []string      `json:"ips,omitempty"`
	Created    time.Time     `json:"created"`
	Containers []psContainer `json:"containers"`
}

type psContainer struct {
	ID       string    `json:"id"`
	Name     string    `json:"name"`
	State    string    `json:"state"`
	Image    string    `json:"image"`
	Restarts uint32    `json:"restarts"`
	Created  time.Time `json:"created"`
}

func psCommand(o *options) *cobra.Command {
	var all bool
	var namespace, output string
	c := &cobra.Command{
		Use:   "ps",
		Short: "List pods and their containers",
		Long: `List pods and, below each, its containers: state, address, image, how often a
container was started again. Without --all only what runs is shown.`,
		Example: `  naru ps
  naru ps --all --namespace kube-system
  naru ps -o json`,
		Args: noArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			cli, err := dialCRI(o)
			if err != nil {
				return err
			}
			defer cli.close()
			pods, err := listPods(c.Context(), cli, all, namespace)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), pods)
			}
			t := newTable(c.OutOrStdout(), "ID", "NAME", "STATE", "ADDRESS/IMAGE", "RESTARTS", "AGE")
			for _, p := range pods {
				t.row(short(p.ID), p.Namespace+"/"+p.Name, p.State, cmp.Or(strings.Join(p.IPs, ","), "-"), "", age(time.Since(p.Created)))
				for _, k := range p.Containers {
					t.row(short(k.ID), "  "+k.Name, k.State, k.Image, strconv.FormatUint(uint64(k.Restarts), 10), age(time.Since(k.Created)))
				}
			}
			t.flush()
			return nil
		},
	}
	c.Flags().BoolVarP(&all, "all", "a", false, "also what has ended")
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "only pods of this namespace")
	outputFlag(c, &output)
	return c
}

func listPods(ctx context.Context, cli *criClient, all bool, namespace string) ([]psPod, error) {
	pods, err := call(ctx, cli, "list pods", func(ctx context.Context) (*criv1.ListPodSandboxResponse, error) {
		return cli.runtime.ListPodSandbox(ctx, &criv1.ListPodSandboxRequest{})
	})
	if err != nil {
		return nil, err
	}
	list, err := call(ctx, cli, "list containers", func(ctx context.Context) (*criv1.ListContainersResponse, error) {
		return cli.runtime.ListContainers(ctx, &criv1.ListContainersRequest{})
	})
	if err != nil {
		return nil, err
	}
	byPod := map[string][]psContainer{}
	for _, k := range list.GetContainers() {
		live := k.GetState() == criv1.ContainerState_CONTAINER_RUNNING || k.GetState() == criv1.ContainerState_CONTAINER_CREATED
		if !all && !live {
			continue
		}
		byPod[k.GetPodSandboxId()] = append(byPod[k.GetPodSandboxId()], psContainer{
			ID: k.GetId(), Name: k.GetMetadata().GetName(), State: state(k.GetState().String(), "CONTAINER_"),
			Image:    cmp.Or(k.GetImage().GetUserSpecifiedImage(), k.GetImage().GetImage(), k.GetImageRef()),
			Restarts: k.GetMetadata().GetAttempt(), Created: time.Unix(0, k.GetCreatedAt()),
		})
	}
	out := []psPod{}
	for _, p := range pods.GetItems() {
		ready := p.GetState() == criv1.PodSandboxState_SANDBOX_READY
		if (!all && !ready && len(byPod[p.GetId()]) == 0) || (namespace != "" && p.GetMetadata().GetNamespace() != namespace) {
			continue
		}
		containers := byPod[p.GetId()]
		slices.SortFunc(containers, func(a, b psContainer) int {
			return cmp.Or(strings.Compare(a.Name, b.Name), a.Created.Compare(b.Created))
		})
		out = append(out, psPod{
			ID: p.GetId(), Namespace: p.GetMetadata().GetNamespace(), Name: p.GetMetadata().GetName(), State: state(p.GetState().String(), "SANDBOX_"),
			IPs: podIPs(ctx, cli, p.GetId()), Created: time.Unix(0, p.GetCreatedAt()), Containers: containers,
		})
	}
	slices.SortFunc(out, func(a, b psPod) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name), a.Created.Compare(b.Created))
	})
	return out, nil
}

func state(s, prefix string) string { return strings.ToLower(strings.TrimPrefix(s, prefix)) }

// podIPs asks for one pod's addresses; a pod that has gone meanwhile has none.
func podIPs(ctx context.Context, cli *criClient, id string) []string {
	r, err := call(ctx, cli, "ask for pod "+id, func(ctx context.Context) (*criv1.PodSandboxStatusResponse, error) {
		return cli.runtime.PodSandboxStatus(ctx, &criv1.PodSandboxStatusRequest{PodSandboxId: id})
	})
	if err != nil {
		return nil
	}
	n := r.GetStatus().GetNetwork()
	if n.GetIp() == "" {
		return nil
	}
	ips := []string{n.GetIp()}
	for _, a := range n.GetAdditionalIps() {
		ips = append(ips, a.GetIp())
	}
	return ips
}
