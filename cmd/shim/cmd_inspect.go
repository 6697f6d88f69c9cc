package main

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
)

// inspected is what "naru inspect" prints.
type inspected struct {
	Kind   string          `json:"kind"`
	Status json.RawMessage `json:"status"`
	Info   map[string]any  `json:"info,omitempty"`
}

func inspectCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect ID",
		Short: "Show all that is known of a container, pod or image, as JSON",
		Long: `Show all that is known of one container, pod or image, as JSON: its CRI status,
and in "info" what CRI leaves to the runtime (pid, namespaces, OCI spec,
configuration). ID is an id, the beginning of one, or an image's name.`,
		Example: `  naru inspect 3f2a
  naru inspect 3f2a | jq .info.info.pid
  naru inspect docker.io/library/nginx:1.27`,
		Args: nArgs(1, 1, "one ID"),
		RunE: func(c *cobra.Command, args []string) error {
			if args[0] == "" {
				return usageErrorf("an empty ID names nothing")
			}
			cli, err := dialCRI(o)
			if err != nil {
				return err
			}
			defer cli.close()
			v, err := inspect(c.Context(), cli, args[0])
			if err != nil {
				return err
			}
			return printJSON(c.OutOrStdout(), v)
		},
	}
}

// inspect asks for the id as a container, a pod and an image. One that begins
// the ids of several kinds names none of them.
func inspect(ctx context.Context, cli *criClient, id string) (*inspected, error) {
	var found []*inspected
	var names []string
	for _, ask := range []func(context.Context, *criClient, string) (*inspected, string, error){inspectContainer, inspectPod, inspectImage} {
		v, name, err := ask(ctx, cli, id)
		switch {
		case err != nil && !errs.Is(err, errs.NotFound):
			return nil, err
		case err != nil:
		case name == id: // it is whole
			return v, nil
		default:
			found, names = append(found, v), append(names, v.Kind+" "+name)
		}
	}
	switch len(found) {
	case 0:
		return nil, errs.New(errs.NotFound, "no container, pod or image %q", clean(id))
	case 1:
		return found[0], nil
	}
	return nil, errs.New(errs.InvalidArgument, "%q is the beginning of several ids: %s; write more of it", clean(id), strings.Join(names, ", "))
}

func inspectContainer(ctx context.Context, cli *criClient, id string) (*inspected, string, error) {
	k, err := call(ctx, cli, "inspect "+id, func(ctx context.Context) (*criv1.ContainerStatusResponse, error) {
		return cli.runtime.ContainerStatus(ctx, &criv1.ContainerStatusRequest{ContainerId: id, Verbose: true})
	})
	if err != nil {
		return nil, "", err
	}
	v, err := toInspected("container", k.GetStatus(), k.GetInfo())
	return v, k.GetStatus().GetId(), err
}

func inspectPod(ctx context.Context, cli *criClient, id string) (*inspected, string, error) {
	p, err := call(ctx, cli, "inspect "+id, func(ctx context.Context) (*criv1.PodSandboxStatusResponse, error) {
		return cli.runtime.PodSandboxStatus(ctx, &criv1.PodSandboxStatusRequest{PodSandboxId: id, Verbose: true})
	})
	if err != nil {
		return nil, "", err
	}
	v, err := toInspected("pod", p.GetStatus(), p.GetInfo())
	return v, p.GetStatus().GetId(), err
}

func inspectImage(ctx context.Context, cli *criClient, id string) (*inspected, string, error) {
	i, err := call(ctx, cli, "inspect "+id, func(ctx context.Context) (*criv1.ImageStatusResponse, error) {
		return cli.images.ImageStatus(ctx, &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: id}, Verbose: true})
	})
	// CRI answers an absent image without an error, and what no image can be
	// called is the name of none.
	if err == nil && i.GetImage() == nil || errs.Is(err, errs.InvalidArgument) {
		err = errs.New(errs.NotFound, "no image %q", clean(id))
	}
	if err != nil {
		return nil, "", err
	}
	v, err := toInspected("image", i.GetImage(), i.GetInfo())
	return v, i.GetImage().GetId(), err
}

func toInspected(kind string, status proto.Message, info map[string]string) (*inspected, error) {
	b, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(status)
	if err != nil {
		return nil, errs.New(errs.Internal, "write the status as JSON: %w", err)
	}
	v := &inspected{Kind: kind, Status: b}
	for key, text := range info {
		if v.Info == nil {
			v.Info = map[string]any{}
		}
		var decoded any
		if json.Unmarshal([]byte(text), &decoded) != nil {
			decoded = text
		}
		v.Info[key] = decoded
	}
	return v, nil
}
