"""Starting Spark: what it needs, how it is set, and its errors in one line."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from data_prep.recipe import Spark
from data_prep.spark_tasks import user_line
from gru4recf_dist.errors import UserError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Rows that a task gets at a time.
TASK_ROWS = 1 << 16
# Of a session that works for the steps; the recipe's settings come after them.
QUERY_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    # Small shuffles become few tasks: the number of partitions below is only where it starts.
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": str(TASK_ROWS),
}
# A local master has no need of Spark's default of 200 partitions, nor of a size that one core cannot sort in memory.
LOCAL_PARTITIONS_PER_CORE = 4


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Spark's exceptions as a `UserError` where one caused them or the user's settings do."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (Py4JError, PySparkException) as error:
        message = str(error)
        line = user_line(message)
        if line is None and "No space left on device" in message:
            line = "temporary_folder: no space left on device"
        if line is None and "OutOfMemoryError" in message:
            line = "spark.settings: too little memory (spark.driver.memory, spark.executor.memory)"
        missing = re.search("ModuleNotFoundError: No module named '([^']+)'", message)
        if line is None and missing:
            line = f"spark: the executors have no package {missing[1]}: install this project into their PYSPARK_PYTHON"
        if line is None and "PYTHON_VERSION_MISMATCH" in message:
            line = "spark: the executors have another version of Python: set PYSPARK_PYTHON to one like the driver's"
        if line is None:
            raise
        # Spark's own text is pages long and says no more.
        raise UserError(line) from None


def start(settings: Spark, folder: str | None) -> tuple[SparkSession, bool]:
    """A new Spark session: in the running application if this process has one, else in an application of its own.

    Returns:
        The session, and whether its application was started for it.

    Args:
        folder: local folder for what Spark spills (a local master only).

    Raises:
        UserError: pyspark or Java is missing, or the cluster cannot be reached.
    """
    # Nothing here goes through pandas.
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas", FutureWarning)
    try:
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise UserError("engine: spark needs the package pyspark: pip install 'gru4recf-dist[spark]'") from error
    running = SparkSession.getActiveSession()
    application = running or _application(settings, folder)
    try:
        session = application.newSession()
        for key, value in {**QUERY_SETTINGS, **_partitions(settings, session), **settings.settings}.items():
            # The others are of the application, which has them already.
            if key.startswith("spark.sql.") and session.conf.isModifiable(key):
                session.conf.set(key, value)
    except PySparkException as error:
        if running is None:
            application.stop()
        raise UserError(f"spark.settings: {_reason(error)}") from error
    return session, running is None


def _partitions(settings: Spark, session: SparkSession) -> dict[str, str]:
    if not settings.is_local:
        return {}
    cores = session.sparkContext.defaultParallelism
    return {"spark.sql.shuffle.partitions": str(LOCAL_PARTITIONS_PER_CORE * cores)}


def _application(settings: Spark, folder: str | None) -> SparkSession:
    from pyspark import SparkConf, SparkContext
    from pyspark.errors import PySparkRuntimeError
    from pyspark.java_gateway import launch_gateway
    from pyspark.sql import SparkSession

    java = os.environ.get("JAVA_HOME")
    if not shutil.which(os.path.join(java, "bin", "java") if java else "java"):
        raise UserError("engine: spark needs Java, 17 or later: install it, or set JAVA_HOME to where it is")
    configuration = SparkConf(loadDefaults=False)
    configuration.setMaster(settings.master).setAppName("data_prep")
    configuration.set("spark.ui.enabled", "false")
    if folder is not None:
        configuration.set("spark.local.dir", folder).set("spark.sql.warehouse.dir", os.path.join(folder, "warehouse"))
    for key, value in settings.settings.items():
        configuration.set(key, value)
    if settings.is_local:
        # Tasks run in this Python, whatever `python3` is on the PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # Spark's log is no output of this program, and has a stack trace for every bad input: it goes where it can be
    # looked up if Spark does not come up.
    with tempfile.TemporaryFile(mode="w+", errors="replace") as log:
        try:
            gateway = launch_gateway(configuration, {"stderr": log})
        except PySparkRuntimeError as error:
            log.seek(0)
            lines = [line.strip() for line in log if line.strip()]
            reason = next((line for line in lines if "rror" in line or "xception" in line), "it says nothing")
            raise UserError(f"spark: cannot be started ({reason})") from error
    try:
        return SparkSession(SparkContext(conf=configuration, gateway=gateway))
    except Exception as error:
        reason = _reason(error)
        raise UserError(f"spark.master: {settings.master}: cannot be used ({reason})") from error


def _reason(error: Exception) -> str:
    """What Java's exception says, without its name and stack trace."""
    lines = [line.strip(" :.") for line in str(error).splitlines() if line.strip(" :.")]
    java = next((line for line in lines if "Exception: " in line), lines[0] if lines else type(error).__name__)
    reason = java.split("Exception: ", 1)[-1]
    # Spark gives up on a cluster by stopping itself.
    return "no answer from it" if "stopped SparkContext" in reason else reason
