package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/admin"
	"github.com/naru-project/naru/internal/errs"
)

func imageCommand(o *options) *cobra.Command {
	c := &cobra.Command{
		Use:   "image",
		Short: "Images without a registry: load, import, list, remove",
		Long: `Bring images onto this node without a registry, see and remove them. The kubelet
sees them at once; use imagePullPolicy IfNotPresent or Never.`,
		Example: `  docker save app:1 | naru image load -
  naru image import ./oci-layout --name example.com/app:1
  naru image list`,
	}
	group(c)
	c.AddCommand(imageLoadCommand(o), imageImportCommand(o), imageListCommand(o), imageRmCommand(o), imagePullsCommand(o))
	return c
}

func imageLoadCommand(o *options) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:   "load FILE|-",
		Short: "Load a docker or OCI archive that is sent to the daemon",
		Long: `Load the images of an archive (docker save, or an OCI layout in a tar file,
compressed or not). "-" reads the archive from standard input. Every byte is
verified; nothing in the archive is trusted.`,
		Example: `  naru image load app.tar
  ssh builder docker save app:1 | naru image load -
  naru image load app.tar --name example.com/team/app:1`,
		Args: nArgs(1, 1, "one FILE, or - for standard input"),
		RunE: func(c *cobra.Command, args []string) error {
			in, total, err := openInput(args[0], c.InOrStdin())
			if err != nil {
				return err
			}
			defer func() { _ = in.Close() }()
			cli, err := dialAdmin(o)
			if err != nil {
				return err
			}
			p := newLoadProgress(c.ErrOrStderr(), total)
			refs, err := cli.Load(c.Context(), p.count(in), name, p.tell)
			p.done()
			return printLoaded(c, refs, err)
		},
	}
	c.Flags().StringVar(&name, "name", "", "reference for the image, in place of the archive's own")
	return c
}

func imageImportCommand(o *options) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:   "import DIR|FILE",
		Short: "Import an OCI layout or an archive that is on the daemon's disk",
		Long: `Import the images of an OCI layout (a folder) or of an archive. The daemon reads
it from the disk itself: nothing is sent.`,
		Example: `  naru image import ./oci-layout
  naru image import /mnt/usb/images.tar`,
		Args: nArgs(1, 1, "one DIR or FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			path, err := filepath.Abs(args[0])
			if err != nil {
				return usageErrorf("path %q: %v", args[0], err)
			}
			if _, err := os.Stat(path); err != nil {
				return errs.New(errs.NotFound, "import: %w", err)
			}
			cli, err := dialAdmin(o)
			if err != nil {
				return err
			}
			p := newLoadProgress(c.ErrOrStderr(), 0)
			refs, err := cli.Import(c.Context(), path, name, p.tell)
			p.done()
			return printLoaded(c, refs, err)
		},
	}
	c.Flags().StringVar(&name, "name", "", "reference for the image, in place of the archive's own")
	return c
}

func printLoaded(c *cobra.Command, refs []string, err error) error {
	if err != nil {
		return err
	}
	for _, r := range refs {
		fmt.Fprintln(c.OutOrStdout(), "loaded", clean(r))
	}
	return nil
}

// openInput opens the archive; total is 0 where its length is not known.
func openInput(name string, stdin io.Reader) (io.ReadCloser, int64, error) {
	if name == "-" {
		if f, ok := stdin.(*os.File); ok && isTerminalReader(f) {
			return nil, 0, usageErrorf("standard input is a terminal: pipe an archive into it, or name a file")
		}
		return io.NopCloser(stdin), 0, nil
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, 0, errs.New(errs.NotFound, "load: %w", err)
	}
	st, err := f.Stat()
	switch {
	case err != nil:
		_ = f.Close()
		return nil, 0, errs.New(errs.Internal, "load: %w", err)
	case st.IsDir():
		_ = f.Close()
		return nil, 0, usageErrorf("%s is a folder: naru image import reads OCI layouts", name)
	case !st.Mode().IsRegular():
		return f, 0, nil
	}
	return f, st.Size(), nil
}

func isTerminalReader(f *os.File) bool { return isTerminal(f) }

// loadProgress joins what this side has sent with what the daemon says.
type loadProgress struct {
	p     *progress
	total int64
	sent  atomic.Int64
	start time.Time
}

func newLoadProgress(w io.Writer, total int64) *loadProgress {
	return &loadProgress{p: newProgress(w), total: total, start: time.Now()}
}

func (l *loadProgress) done() { l.p.done() }

// tell is called for each line of the daemon's.
func (l *loadProgress) tell(a admin.Progress) {
	took := age(time.Since(l.start))
	switch {
	case a.Stage == "unpack":
		l.p.show("unpacking … " + took)
	case l.total > 0:
		l.p.show(fmt.Sprintf("sent %s of %s, %d%% … %s", size(uint64(l.sent.Load())), size(uint64(l.total)), l.sent.Load()*100/l.total, took))
	default:
		l.p.show(fmt.Sprintf("sent %s … %s", size(uint64(l.sent.Load())), took))
	}
}

func (l *loadProgress) count(r io.Reader) io.Reader { return &countReader{r: r, n: &l.sent} }

type countReader struct {
	r io.Reader
	n *atomic.Int64
}

func (c *countReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n.Add(int64(n))
	return n, err //nolint:wrapcheck // a reader's errors pass as they are
}

// psImage is one image as "naru image list" shows it.
type psImage struct {
	ID      string   `json:"id"`
	Tags    []string `json:"tags,omitempty"`
	Digests []string `json:"digests,omitempty"`
	Size    uint64   `json:"size"`
	Pinned  bool     `json:"pinned,omitempty"`
}

func imageListCommand(o *options) *cobra.Command {
	var output string
	c := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List the images of this node",
		Args:    noArgs,
		Example: `  naru image list
  naru image list -o json`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			cli, err := dialCRI(o)
			if err != nil {
				return err
			}
			defer cli.close()
			images, err := listImages(c.Context(), cli)
			if err != nil {
				return err
			}
			if output == "json" {
				return printJSON(c.OutOrStdout(), images)
			}
			t := newTable(c.OutOrStdout(), "IMAGE", "ID", "SIZE", "")
			for _, i := range images {
				pinned := ""
				if i.Pinned {
					pinned = "pinned"
				}
				names := i.Tags
				if len(names) == 0 {
					names = i.Digests
				}
				if len(names) == 0 {
					names = []string{"<no name>"}
				}
				for _, n := range names {
					t.row(n, short(i.ID), size(i.Size), pinned)
				}
			}
			t.flush()
			return nil
		},
	}
	outputFlag(c, &output)
	return c
}

func listImages(ctx context.Context, cli *criClient) ([]psImage, error) {
	r, err := call(ctx, cli, "list images", func(ctx context.Context) (*criv1.ListImagesResponse, error) {
		return cli.images.ListImages(ctx, &criv1.ListImagesRequest{})
	})
	if err != nil {
		return nil, err
	}
	out := []psImage{}
	for _, i := range r.GetImages() {
		out = append(out, psImage{ID: i.GetId(), Tags: i.GetRepoTags(), Digests: i.GetRepoDigests(), Size: i.GetSize(), Pinned: i.GetPinned()})
	}
	slices.SortFunc(out, func(a, b psImage) int {
		return cmp.Or(strings.Compare(strings.Join(a.Tags, " "), strings.Join(b.Tags, " ")), strings.Compare(a.ID, b.ID))
	})
	return out, nil
}

func imageRmCommand(o *options) *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use:     "rm IMAGE...",
		Aliases: []string{"remove"},
		Short:   "Remove images, with all their names",
		Long: `Remove images, each with all its names. An image that a container was made from is
left alone unless --force is given; its layers stay until that container goes,
in either case.`,
		Example: `  naru image rm example.com/app:1
  naru image rm 4f1a --force`,
		Args: nArgs(1, -1, "at least one IMAGE: a name or an id"),
		RunE: func(c *cobra.Command, args []string) error {
			cli, err := dialCRI(o)
			if err != nil {
				return err
			}
			defer cli.close()
			failed := false
			for _, a := range args {
				if err := removeImage(c.Context(), cli, a, force); err != nil {
					failed = true
					fmt.Fprintln(c.ErrOrStderr(), "naru:", err)
					continue
				}
				fmt.Fprintln(c.OutOrStdout(), "removed", clean(a))
			}
			if failed {
				return silentError{}
			}
			return nil
		},
	}
	c.Flags().BoolVarP(&force, "force", "f", false, "also if a container was made from it")
	return c
}

func removeImage(ctx context.Context, cli *criClient, ref string, force bool) error {
	spec := &criv1.ImageSpec{Image: ref}
	s, err := call(ctx, cli, "remove image "+ref, func(ctx context.Context) (*criv1.ImageStatusResponse, error) {
		return cli.images.ImageStatus(ctx, &criv1.ImageStatusRequest{Image: spec})
	})
	if err != nil {
		return err
	}
	if s.GetImage() == nil {
		return errs.New(errs.NotFound, "remove image %s: there is none", clean(ref))
	}
	if !force {
		k, err := call(ctx, cli, "list containers", func(ctx context.Context) (*criv1.ListContainersResponse, error) {
			return cli.runtime.ListContainers(ctx, &criv1.ListContainersRequest{})
		})
		if err != nil {
			return err
		}
		for _, x := range k.GetContainers() {
			if x.GetImageId() == s.GetImage().GetId() || x.GetImageRef() == s.GetImage().GetId() || slices.Contains(s.GetImage().GetRepoDigests(), x.GetImageRef()) {
				return errs.New(errs.FailedPrecondition, "remove image %s: container %s (%s) was made from it; --force removes it all the same",
					clean(ref), short(x.GetId()), clean(x.GetMetadata().GetName()))
			}
		}
	}
	_, err = call(ctx, cli, "remove image "+ref, func(ctx context.Context) (*criv1.RemoveImageResponse, error) {
		return cli.images.RemoveImage(ctx, &criv1.RemoveImageRequest{Image: &criv1.ImageSpec{Image: s.GetImage().GetId()}})
	})
	return err
}

func imagePullsCommand(o *options) *cobra.Command {
	var output string
	var watch bool
	c := &cobra.Command{
		Use:   "pulls",
		Short: "Show the images that are being fetched, and how far they are",
		Args:  noArgs,
		Example: `  naru image pulls
  naru image pulls --watch`,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			cli, err := dialAdmin(o)
			if err != nil {
				return err
			}
			return repeat(c.Context(), c.OutOrStdout(), watch, func(ctx context.Context, w io.Writer) error {
				pulls, err := cli.Pulls(ctx)
				if err != nil {
					return err
				}
				if output == "json" {
					return printJSON(w, pulls)
				}
				printPulls(w, pulls, time.Now())
				return nil
			})
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "again every second, until interrupted")
	outputFlag(c, &output)
	return c
}

func printPulls(w io.Writer, pulls []admin.Pull, now time.Time) {
	if len(pulls) == 0 {
		fmt.Fprintln(w, "nothing is being fetched")
		return
	}
	t := newTable(w, "IMAGE", "STAGE", "LAYERS", "BYTES", "WAITING", "AGE")
	for _, p := range pulls {
		bytes := size(uint64(max(p.Bytes, 0)))
		if p.Total > 0 {
			bytes += " of " + size(uint64(p.Total))
		}
		t.row(p.Ref, p.Stage, fmt.Sprintf("%d/%d", p.Layers, p.AllLayers), bytes, strconv.Itoa(p.Waiting), age(now.Sub(p.Started)))
	}
	t.flush()
}
