"""Why a call goes around the cache, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchcache.kinds import Kind

if TYPE_CHECKING:
    from typing_extensions import Self


#: What else is said of a module in training mode: where it comes from, in most programs.
_STAY_IN_EVAL_MODE = (
    ". Where train() is called on all of the model, as HF's Trainer does at each step, let the frozen part stay in "
    "eval mode: 'def train(self, mode=True): return super().train(False)' in its class"
)


class Reason(Kind):
    """Why a call is computed as if there were no cache, or its rows are not kept.

    Attributes:
        remedy: What the log says of it, once.
        note: What the reference says beside that.
    """

    remedy: str
    note: str

    def __new__(cls, value: str, remedy: str = "", note: str = "") -> Self:
        """Make a member that is the text that ``stats()`` counts."""
        reason = str.__new__(cls, value)
        reason._value_, reason.remedy, reason.note = value, remedy, note
        return reason

    INPUT_REQUIRES_GRAD = (
        "input_requires_grad",
        (
            "an input requires grad, and gradients do not flow through cached outputs; detach it or call the module "
            "under torch.no_grad()"
        ),
    )
    AMBIGUOUS_TUPLE = (
        "ambiguous_tuple",
        "a tuple as long as the batch may hold one value per sample or one value that all samples share",
        (
            "pass a list if each sample has its own value, or name the argument in unbatched if all samples share "
            "the tuple"
        ),
    )
    ATTRIBUTE_OF_INPUT = (
        "attribute_of_input",
        (
            "a tensor of the batch has an attribute that is no number or text, so it may hold one value per sample; "
            "pass what the code needs as an argument of its own, and delete the attribute"
        ),
        "attributes that are numbers, texts and the like count, as values that all samples share",
    )
    FORWARD_MODE_GRADIENTS = (
        "forward_mode_gradients",
        (
            "forward-mode gradients are computed, and they do not flow through cached outputs; call the module "
            "outside of the dual level"
        ),
    )
    FUNCTORCH_TRANSFORM = (
        "functorch_transform",
        "a transform of torch.func (vmap, grad, jvp) is under way; call the module outside of it",
    )
    PARAMETERS_REQUIRE_GRAD = (
        "parameters_require_grad",
        "parameters require grad and when_grad='bypass'; call requires_grad_(False) on what is frozen",
    )
    BATCH_NORM_IN_TRAINING_MODE = (
        "batch_norm_in_training_mode",
        (
            "a batch norm is in training mode, so a sample's result depends on its batch; call eval() on the cached "
            f"module{_STAY_IN_EVAL_MODE}"
        ),
    )
    BATCH_NORM_WITHOUT_RUNNING_STATISTICS = (
        "batch_norm_without_running_statistics",
        (
            "a batch norm has no running statistics, so a sample's result depends on its batch; it cannot be cached "
            "sample by sample"
        ),
    )
    DROPOUT_IN_TRAINING_MODE = (
        "dropout_in_training_mode",
        (
            "a dropout or its like is in training mode, so results are random; call eval() on the cached module"
            f"{_STAY_IN_EVAL_MODE}"
        ),
    )
    COLLECTIVES = (
        "collectives",
        (
            "the call does something together with the other ranks of the job, and a rank that found its rows would "
            "leave them waiting; cache a part of the model that each rank computes by itself. Code counts in "
            "whichever mode it runs: what the ranks do together in training only belongs outside of the cached "
            "module"
        ),
        (
            "functions of torch.distributed count, nested FSDP or DistributedDataParallel modules, and a DTensor; a "
            "process without other ranks caches the same module"
        ),
    )
    ROWS_DEPEND_ON_BATCH = (
        "rows_depend_on_batch",
        (
            "a row that was computed with another batch came back different, so results depend on the batch and "
            "cannot be cached sample by sample; make dimension 0 of every tensor the batch, cache a part of the "
            "model that treats each row alone, or set check_rows=False if the difference is meant; where padded is "
            "set, the model must take its mask into account"
        ),
    )
    ROWS_NOT_CHECKED = (
        "rows_not_checked",
        (
            "it is not known whether results depend on the batch, and mode='require' computes nothing to find out; "
            "compute a batch of two samples or more with mode='on', or set check_rows=False both times"
        ),
        "a reason for dropped_rows too, until a batch of two different samples was computed",
    )
    OTHER_BATCH_FAILED = (
        "other_batch_failed",
        "the call failed with some of its rows and succeeded with all of them; it is tried again",
    )
    OTHER_LENGTH_FAILED = (
        "other_length_failed",
        (
            "a row could not be computed with another padding, or nothing came of it but zeros, so it is not known "
            "what of its result follows the length; it is tried again. The mask must say what is real, not what is "
            "padding"
        ),
    )
    OTHER_LENGTHS = (
        "other_lengths",
        (
            "something in the result of a padded batch depends on the length of the batch and is not as long as the "
            "mask, as where a model shortens its input (wav2vec 2.0), so rows cannot be cut from it; return what does "
            "not depend on the length, such as a mean over the real positions, or cache a part of the model that keeps "
            "the length"
        ),
    )
    RANDOM_NUMBERS = (
        "random_numbers",
        "random numbers were drawn while the call ran, so its result may not be a function of its input",
        (
            "it may have been another thread; after three such calls in a row, it is tried again now and then only. "
            "In a dataset, give what is random to augment=. Where the line names a function, such as uuid.uuid4, the"
            " code may draw from it whatever the seed ([what is found](keys.md#random-numbers)): draw outside of the"
            " cached code, or set persistent_module_hash if results do not depend on it"
        ),
    )
    INPUT_CHANGED_IN_PLACE = (
        "input_changed_in_place",
        (
            "the call changes its input, as inplace=True in its first layer, dict.pop or BatchEncoding.to() do, and "
            "a hit would leave it as it is; set inplace=False, copy or move the input before the call, or cache a "
            "part that changes nothing"
        ),
    )
    STATE_CHANGES_AT_EVERY_CALL = (
        "state_changes_at_every_call",
        (
            "weights or plain attributes change at every call; it is cached again when they stand still. Name what "
            "shapes no result in ignore=(...)"
        ),
    )
    OPAQUE_STATE = (
        "opaque_state",
        (
            "the state holds something that torchcache cannot see into, so that a change of it would not be noticed;"
            " register its class with torchcache.register_value(), name it in ignore= if it shapes no result, or set"
            " persistent_module_hash"
        ),
    )
    OPAQUE_CODE = (
        "opaque_code",
        (
            "the code calls an operator of torch.ops of which it is not known what runs, so that a change of it "
            "would not be noticed; import torchcache before the module that registers it, define it with "
            "torch.library.custom_op, or set persistent_module_hash"
        ),
    )
    TAKES_TOO_LONG = (
        "takes_too_long",
        (
            "to look at its code, or at its state, takes more than 30 seconds; name an attribute that takes so long "
            "in ignore= if it shapes no result, or set persistent_module_hash to a name of your own, such as "
            "'encoder-1'"
        ),
        "refresh() tries it again",
    )
    FULLY_MASKED_ROW = (
        "fully_masked_row",
        (
            "the mask leaves nothing of a row, so its result may depend on how far it is padded; leave such rows out"
            " of the batch"
        ),
    )
    SAMPLE_KEY_OF_OTHER_INPUTS = (
        "sample_key_of_other_inputs",
        (
            "a key that sample_keys() was given came with other inputs before, in this or an earlier program; give "
            "each input a key of its own, for example one that also names the augmentation, or clear() the cache if "
            "the inputs were changed for good"
        ),
    )
    ROWS_DO_NOT_STACK = (
        "rows_do_not_stack",
        "the rows of one batch have results of different shapes or plain values",
    )
    UNSUPPORTED_RESULT = (
        "unsupported_result",
        "the result holds something that would not come back as it is, so it is not kept",
        (
            "return plain tensors, arrays and values. After the first call that was cached, it also stands for a "
            "result whose rows are not the batch's"
        ),
    )
    UNSUPPORTED_CALL = (
        "unsupported_call",
        (
            "the call cannot be split into samples, or an argument of it cannot be named, and calls before it were "
            "cached, so it is computed instead of refused"
        ),
        "the log says what to pass",
    )
    RESULT_TOO_LARGE = (
        "result_too_large",
        "the result is too large or lies too deep to be kept, so it is returned as it is",
        (
            "that is more than 256 tensors, or plain values that are more than 4,096, more than 32 KiB or more than "
            "32 deep; return large values as tensors with one row per sample, or cache a part that returns less"
        ),
    )
    PARAMETER_AS_RESULT = (
        "parameter_as_result",
        "the result is a parameter, which would come back as a plain tensor; return parameter.detach()",
    )
    ATTRIBUTES_OF_RESULT = (
        "attributes_of_result",
        "a tensor in the result has attributes, which would not come back; return them beside it",
    )
    RESULT_CANNOT_BE_REBUILT = (
        "result_cannot_be_rebuilt",
        "a class of the result refuses to be rebuilt from its parts",
        "return plain containers",
    )
    OPAQUE_WEIGHTS = (
        "opaque_weights",
        (
            "weights are tensors without plain bytes (sparse, quantized), so that a change of theirs could not be "
            "seen; set persistent_module_hash if they are frozen"
        ),
    )
    SCRIPTED_MODULE = (
        "scripted_module",
        (
            "the module contains a scripted one, whose code and attributes are not Python any more; cache it through"
            " a function or module of your own under persistent_module_hash"
        ),
    )
    UNINITIALIZED_PARAMETERS = (
        "uninitialized_parameters",
        "lazy parameters get their values in the first call",
    )
    GLOBAL_MODULE_HOOKS = (
        "global_module_hooks",
        "hooks on all modules are registered, and they do not run on hits",
    )
    PARAMETRIZATIONS_HELD = (
        "parametrizations_held",
        (
            "torch.nn.utils.parametrize.cached() holds weights that it computed before, whatever was written since; "
            "call the module outside of it"
        ),
    )
    TORCH_DISPATCH_MODE = (
        "torch_dispatch_mode",
        "a TorchDispatchMode is active, which sees and may change every operation",
    )
    TORCH_FUNCTION_MODE = (
        "torch_function_mode",
        "a TorchFunctionMode is active, which sees and may change every operation",
    )
    OUT_OF_MEMORY = (
        "out_of_memory",
        "there is no memory for a copy of the batch",
    )
    UNREADABLE_STATE = (
        "unreadable_state",
        "an attribute of the module cannot be read; see the fault in the log",
    )
    EMPTY_BATCH = (
        "empty_batch",
        (
            "only the function knows the form of its result for a batch without rows, and mode='require' does not "
            "run it; leave empty batches out"
        ),
    )
    EXPORT_OR_TRACE = (
        "export_or_trace",
        "the call is being exported, traced or scripted",
    )
    TENSOR_SUBCLASS = (
        "tensor_subclass",
        (
            "a cached call takes and returns plain strided tensors; convert the derived class with "
            "x.as_subclass(torch.Tensor)"
        ),
        (
            "samples of a dataset, and results with batch_dim=None, keep a derived class that adds attributes, such as "
            "those of torchvision.tv_tensors and monai; not one that has a __torch_dispatch__ or slots"
        ),
    )
    META_TENSOR = (
        "meta_tensor",
        "a cached call takes and returns plain strided tensors; convert it before the call",
    )
    NESTED_TENSOR = (
        "nested_tensor",
        "a cached call takes and returns plain strided tensors; convert it before the call",
    )
    SPARSE_TENSOR = (
        "sparse_tensor",
        "a cached call takes and returns plain strided tensors; convert it before the call",
    )
    QUANTIZED_TENSOR = (
        "quantized_tensor",
        "a cached call takes and returns plain strided tensors; convert it before the call",
    )
    UNSUPPORTED_DTYPE = (
        "unsupported_dtype",
        "a cached call takes and returns plain strided tensors; convert it before the call",
    )


#: What is said of ``random_numbers`` where the code shows it, not a computed call; the evidence names what was found.
RANDOM_CODE = "random_numbers, in the code"
REMEDY_OF_RANDOM_CODE = (
    "the code may draw random numbers that no seed decides, and caching would freeze them; draw them outside of the "
    "cached code and pass them in, or set persistent_module_hash if results do not depend on them"
)
