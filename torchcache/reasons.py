"""Why a call goes around the cache, and what to do about it."""

from __future__ import annotations

#: What the log says once of each reason.
REMEDIES = {
    "input_requires_grad": "an input requires grad, and gradients do not flow through cached outputs; detach "
    "it or call the module under torch.no_grad()",
    "ambiguous_tuple": "a tuple as long as the batch may hold one value per sample or one value that all samples share",
    "forward_mode_gradients": "forward-mode gradients are computed, and they do not flow through cached "
    "outputs; call the module outside of the dual level",
    "functorch_transform": "a transform of torch.func (vmap, grad, jvp) is under way; call the module outside of it",
    "parameters_require_grad": "parameters require grad and when_grad='bypass'; call requires_grad_(False) on "
    "what is frozen",
    "batch_norm_in_training_mode": "a batch norm is in training mode, so a sample's result depends on its batch; "
    "call eval() on the cached module",
    "batch_norm_without_running_statistics": "a batch norm has no running statistics, so a sample's result depends "
    "on its batch; it cannot be cached sample by sample",
    "dropout_in_training_mode": "a dropout or its like is in training mode, so results are random; call eval() on "
    "the cached module",
    "collectives": "the call does something together with the other ranks of the job, and a rank that found its rows "
    "would leave them waiting; cache a part of the model that each rank computes by itself. Code counts in whichever "
    "mode it runs: what the ranks do together in training only belongs outside of the cached module",
    "rows_depend_on_batch": "a row that was computed with another batch came back different, so results depend on "
    "the batch and cannot be cached sample by sample; make dimension 0 of every tensor the batch, cache a part of "
    "the model that treats each row alone, or set check_rows=False if the difference is meant; where padded is set, "
    "the model must take its mask into account",
    "rows_not_checked": "it is not known whether results depend on the batch, and mode='require' computes nothing to "
    "find out; compute a batch of two samples or more with mode='on', or set check_rows=False both times",
    "other_batch_failed": "the call failed with some of its rows and succeeded with all of them; it is tried again",
    "other_length_failed": "a row could not be computed with another padding, or nothing came of it but zeros, so it "
    "is not known what of its result follows the length; it is tried again. The mask must say what is real, not what "
    "is padding",
    "random_numbers": "random numbers were drawn while the call ran, so its result may not be a function of its input",
    "input_changed_in_place": "the call changes its input, as inplace=True in its first layer, dict.pop or "
    "BatchEncoding.to() do, and a hit would leave it as it is; set inplace=False, copy or move the input before the "
    "call, or cache a part that changes nothing",
    "state_changes_at_every_call": "weights or plain attributes change at every call; it is cached again when they "
    "stand still",
    "opaque_state": "the state holds something that torchcache cannot see into, so that a change of it would not be "
    "noticed; register its class with torchcache.register_value(), name it in ignore= if it shapes no result, or set "
    "persistent_module_hash",
    "opaque_code": "the code calls an operator of torch.ops of which it is not known what runs, so that a change of it "
    "would not be noticed; import torchcache before the module that registers it, define it with "
    "torch.library.custom_op, or set persistent_module_hash",
    "takes_too_long": "to look at its code, or at its state, takes more than 30 seconds; set "
    "persistent_module_hash to a name of your own, such as 'encoder-1'",
    "fully_masked_row": "the mask leaves nothing of a row, so its result may depend on how far it is padded; leave "
    "such rows out of the batch",
    "sample_key_of_other_inputs": "a key that sample_keys() was given came with other inputs before, in this or an "
    "earlier program; give each input a key of its own, for example one that also names the augmentation, or clear() "
    "the cache if the inputs were changed for good",
    "rows_do_not_stack": "the rows of one batch have results of different shapes or plain values",
    "unsupported_result": "the result holds something that would not come back as it is, so it is not kept",
    "unsupported_call": "the call cannot be split into samples, or an argument of it cannot be named, and calls before "
    "it were cached, so it is computed instead of refused",
    "result_too_large": "the result is too large or lies too deep to be kept, so it is returned as it is",
    "parameter_as_result": "the result is a parameter, which would come back as a plain tensor; return "
    "parameter.detach()",
    "attributes_of_result": "a tensor in the result has attributes, which would not come back; return them beside it",
    "result_cannot_be_rebuilt": "a class of the result refuses to be rebuilt from its parts",
    "opaque_weights": "weights are tensors without plain bytes (sparse, quantized), so that a change of theirs could "
    "not be seen; set persistent_module_hash if they are frozen",
    "scripted_module": "the module contains a scripted one, whose code and attributes are not Python any more; "
    "cache it through a function or module of your own under persistent_module_hash",
    "uninitialized_parameters": "lazy parameters get their values in the first call",
    "global_module_hooks": "hooks on all modules are registered, and they do not run on hits",
    "parametrizations_held": "torch.nn.utils.parametrize.cached() holds weights that it computed before, whatever was "
    "written since; call the module outside of it",
    "torch_dispatch_mode": "a TorchDispatchMode is active, which sees and may change every operation",
    "torch_function_mode": "a TorchFunctionMode is active, which sees and may change every operation",
    "out_of_memory": "there is no memory for a copy of the batch",
    "unreadable_state": "an attribute of the module cannot be read; see the fault in the log",
    "empty_batch": "only the function knows the form of its result for a batch without rows, and mode='require' does "
    "not run it; leave empty batches out",
    "export_or_trace": "the call is being exported, traced or scripted",
}  # fmt: skip
#: Stands for "random_numbers" where the code shows it, not a computed call; evidence then names what was found.
RANDOM_CODE = "random_numbers, in the code"
_REMEDY_OF_RANDOM_CODE = (
    "the code may draw random numbers that no seed decides, and caching would freeze them; draw them outside of the "
    "cached code and pass them in, or set persistent_module_hash if results do not depend on them"
)

_OTHER_REMEDY = "a cached call takes and returns plain strided tensors; convert it before the call"


def remedy_for(reason: str) -> str:
    """Return what to say of a reason; those without an entry are about kinds of tensors."""
    return _REMEDY_OF_RANDOM_CODE if reason == RANDOM_CODE else REMEDIES.get(reason, _OTHER_REMEDY)
