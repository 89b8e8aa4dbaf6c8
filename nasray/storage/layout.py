"""The name of every file in a run directory, relative to that directory.

`join(run_dir, layout.SUPERNET)` is a path. docs/run.md describes what the files hold.
"""

JOB = "job.json"
FINGERPRINT = "fingerprint.json"  # hash of the data set
DATA = "data"  # the imported data set, unless the job names another place
DATASET = "dataset.json"  # in the folder of every imported data set; written last
DATA_CHECK = "data_check.json"  # what an import found in the images, in sentences
SOURCE_FILES = "source.parquet"  # beside it: names, sizes and times of what was imported
LOCK = "lock"  # local disks
LEASES = "_leases"  # object stores

START = "init"  # what training begins with, where the job names files for it
START_DIGESTS = "init/digests.json"  # of these files
INIT = "init/supernet.pt"
TEACHER = "init/teacher.pt"
TEACHER_RUN = "teacher"  # a supernet's files, of the teacher that is trained before it

SUPERNET = "supernet.pt"
SUPERNET_CURVES = "curves/supernet.json"
TRAIN = "train"  # checkpoints of Ray Train

HISTORY = "history"
SUPERNET_DIGEST = "history/_supernet.json"  # hash of the supernet that was evaluated
SEARCH_INPUTS = "history/_begun.json"  # hashes of what a search must be resumed with
PRECISION = "history/_precision.json"  # of all evaluations
SINGLE_EVALUATIONS = "_evaluations"  # in HISTORY; readers of Parquet data sets skip such names

SEARCH = "search.json"
FRONT = "front.json"
TOP = "top.json"
PREDICTOR = "predictor/predictor.pt"
PREDICTOR_FIT = "predictor/fit.json"
CALIBRATION_STUDY = "calibration.json"

RANK = "rank.json"
RANKED = "ranked"  # what `nasray rank` trains, as in RETRAIN

RETRAIN = "retrain"
EXPORT = "export"
EARLIER = "earlier"  # by number: RETRAIN, EXPORT and JOB as they were before the next retraining
REPORT = "report.html"

TRACKED = "tracking.json"  # under which name the run's curves are published
MLFLOW = "mlflow.db"  # a store of MLflow's, where the job names no other
TENSORBOARD = "tensorboard"  # in a folder of that name: its event files
WANDB = "wandb"  # files of Weights & Biases

# In the folder of one retrained architecture.
GENES = "genes.json"
MODEL = "model.pt"
PROFILE = "profile.json"
RESULT = "result.json"
PREDICTIONS = "validation.parquet"
# In the folder of one of its trials; CURVES is also, for all trials together, in the one above.
TRIAL = "trial-"
STATE = "state.pt"  # in a checkpoint of Ray Train; of a trial, by older versions
CURVES = "curves.json"
FAILURE = "failure.json"
TUNE = "tune"  # beside the trials: what Ray Tune keeps while it runs


def generation(source: str, number: int) -> str:
    """One recorded generation of evaluations, in HISTORY."""
    return f"{source}-{number:04d}.parquet"


def retrained(name: str, *names: str) -> str:
    """The folder of the retrained architecture `name`, or what is at `names` below it."""
    return "/".join((RETRAIN, name, *names))


def exported(name: str, suffix: str) -> str:
    """The exported network `name`: suffix "onnx", or "json" for its check."""
    return f"{EXPORT}/{name}.{suffix}"


def network_of(file: str) -> str:
    """The network whose exported `file`, a name or path, is: "0-scratch" of 0-scratch-int8.onnx."""
    name = file.rsplit("/", 1)[-1].rpartition(".")[0]
    return name.removesuffix("-int8").removesuffix("-fp16")


def trial_state(num_epochs: int) -> str:
    """What a trial goes on from after so many epochs, in its folder.

    The name tells the content, as training is a function of the seed: a late write by a process
    that was given up replaces nothing newer.
    """
    return f"state-{num_epochs:06d}.pt"
