package ring

// unimplemented is the reason of calls that answer so; TestFields asks them.
const unimplemented = "the call is not implemented, see the README"

// exceptions are the fields that need no check, with the reason.
var exceptions = []exception{
	{"Version.version", "the caller's version; CRI has one version, so every caller gets the same answer"},
	{"CheckpointPod.*", unimplemented},
	{"RestorePod.*", unimplemented},
	{"*.windows.*", "Naru runs on Linux only"},
	{"CreateContainer.sandbox_config.*", "a copy of what RunPodSandbox was given; Naru believes its own record of the pod"},
	{"PullImage.sandbox_config.*", "an image is the same for every pod, so nothing of the pod matters to a pull"},
	{"*.seccomp_profile_path", "deprecated, and not set by kubelet since 1.24; `seccomp` counts"},
	{"RunPodSandbox.config.linux.security_context.namespace_options.target_id", "goes with TARGET, which is for containers; a sandbox with that mode is refused"},
	{"UpdateContainerResources.annotations", "nothing that Naru knows is asked for by an annotation"},
	{"*Image*.image.annotations", "an image is found by its name, and is that of the node's platform"},
	{"*Image*.image.user_specified_image", "an image is found by `image`, which kubelet has resolved"},
	{"*.image_ref", "a field of answers: what an image volume resolved to, told by ContainerStatus"},
}

// notYetCovered are the fields whose check is still missing. The list may only
// become shorter: mostUncovered goes down with it.
const mostUncovered = 0

var notYetCovered []exception
