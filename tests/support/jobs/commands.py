"""Commands inside workers, without a process for each."""

NO_ENGINE = "no engine is started here"


def outcome_of(module: str, arguments: list[str]) -> tuple[str, str]:
    """("refused", the line) where a command refuses, or ("ended", its exit code).

    No inference engine is started, which would take long: a comparison that comes so far is refused by `NO_ENGINE`.
    Anything else that it raises fails the job: a user would see a traceback.
    """
    import importlib
    from unittest import mock

    from skv_tools.convert import verify

    from skv_dist.errors import UserError
    from skv_dist.parallel.processes import groups

    main = importlib.import_module(module).main.__wrapped__  # what `entry_point` makes a command of
    no_engine = mock.Mock(side_effect=UserError(NO_ENGINE))
    try:
        with mock.patch.object(verify, "run_engine", no_engine):
            return "ended", str(main(arguments))
    except UserError as error:
        return "refused", str(error)
    finally:
        groups.leave_model_parallel()
