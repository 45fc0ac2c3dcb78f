"""Dashboards as Grafana reads them, through Grafana's own builders."""

from __future__ import annotations

import json
from typing import Any

from grafana_foundation_sdk.builders import common as cb
from grafana_foundation_sdk.builders import dashboard as db
from grafana_foundation_sdk.builders import prometheus as prom
from grafana_foundation_sdk.builders import stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.src import runbooks
from dashboards.src.model import SHARE, Board, Kind, Panel, Row, Variable

SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "storaged"
COLUMNS = 24
_BUILDERS: dict[Kind, Any] = {
    Kind.STAT: stat.Panel,
    Kind.LINES: timeseries.Panel,
    Kind.STACK: timeseries.Panel,
    Kind.STATES: statetimeline.Panel,
    Kind.TABLE: table.Panel,
}


def render(board: Board, published: str = "") -> str:
    """The JSON of `board`. `published`: where runbooks are, if not beside it."""
    built = (
        _common(db.Dashboard(board.title).uid(board.uid).description(board.text))
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
        .with_variable(db.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in board.variables:
        built = built.with_variable(_variable(variable))
    return _written(built, _panels(board, published))


def render_runbooks() -> str:
    """The JSON of the dashboard that the others' panels lead to."""
    return _written(_common(runbooks.bare()), runbooks.panels())


def _common(built: db.Dashboard) -> db.Dashboard:
    return (
        built.tags([TAG])
        .editable()
        .timezone("browser")
        .link(
            db.DashboardLink("storaged")
            .type(dashboard.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(as_dropdown=False)
            .include_vars(include_vars=True)
            .keep_time(keep_time=True)
        )
    )


def _written(built: db.Dashboard, panels: list[dict[str, Any]]) -> str:
    document = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    document["panels"] = panels
    for one in document.get("templating", {}).get("list", []):
        for key in [key for key in one if key.startswith("auto")]:
            del one[key]  # not in Grafana's schema for this kind of variable
    document.pop("id", None)
    return json.dumps(_visible(document), indent=2, ensure_ascii=False) + "\n"


def _visible(value: Any) -> Any:
    """`value` with every link where people see it: the builders put all links into a menu."""
    if isinstance(value, dict):
        return {key: _visible(one) for key, one in value.items() if (key, one) != ("placement", "inControlsMenu")}
    return [_visible(one) for one in value] if isinstance(value, list) else value


def _variable(variable: Variable) -> db.QueryVariable:
    built = (
        db.QueryVariable(variable.name)
        .label(variable.label)
        .datasource(SOURCE)
        .query({"query": variable.query, "refId": variable.name, "qryType": 1})
        .definition(variable.query)
        .refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(dashboard.VariableSort.NATURAL_ASC)
        .multi(variable.many)
        .include_all(variable.many)
    )
    if variable.many:
        built = built.all_value(".+").current(dashboard.VariableOption(selected=True, text=["All"], value=["$__all"]))
    return built


def _panels(board: Board, published: str) -> list[dict[str, Any]]:
    """Rows and panels in reading order, placed without holes."""
    placed: list[dict[str, Any]] = []
    y = 0
    for row in board.rows:
        head = json.loads(json.dumps(db.Row(row.title).build(), cls=JSONEncoder))
        placed.append(head | {"id": len(placed) + 1, "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}})
        y += 1
        for line in _broken(row):
            x = 0
            for panel in line:
                spot = {"x": x, "y": y, "w": panel.width, "h": line[0].height}
                placed.append(_panel(panel, published) | {"id": len(placed) + 1, "gridPos": spot})
                x += panel.width
            y += line[0].height
    return placed


def _broken(row: Row) -> list[list[Panel]]:
    """The row's panels in lines of 24 columns. Raises ValueError when they leave a hole."""
    broken: list[list[Panel]] = [[]]
    for panel in row.panels:
        if sum(one.width for one in broken[-1]) == COLUMNS:
            broken.append([])
        broken[-1].append(panel)
    for line in broken:
        if sum(one.width for one in line) != COLUMNS or len({one.height for one in line}) != 1:
            raise ValueError(f"{row.title}: {[one.title for one in line]} do not fill a line")
    return broken


def _thresholds(panel: Panel) -> db.ThresholdsConfig:
    steps = [dashboard.Threshold(value=value, color=color) for value, color in panel.steps]
    return db.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE).steps(steps)


def _panel(panel: Panel, published: str) -> dict[str, Any]:
    built = (
        _BUILDERS[panel.kind]()
        .title(panel.title)
        .description(panel.text)
        .datasource(SOURCE)
        .unit(panel.unit)
        .thresholds(_thresholds(panel))
    )
    if panel.runbook:
        link = db.DashboardLink(f"Runbook: {panel.runbook}").url(runbooks.link(panel.runbook, published))
        built = built.links([link.target_blank(target_blank=True)])
    if panel.quiet:
        built = built.no_value(panel.quiet)
    if panel.names:
        built = built.mappings([_mapping(panel)])
    built = _SHAPES[panel.kind](built, panel)
    for index, query in enumerate(panel.queries):
        target = prom.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(ord("A") + index))
        target = target.instant() if panel.kind in (Kind.STAT, Kind.TABLE) else target.range()
        target = target.format(PromQueryFormat.TABLE if panel.kind is Kind.TABLE else PromQueryFormat.TIME_SERIES)
        built = built.with_target(target)
    done: dict[str, Any] = json.loads(json.dumps(built.build(), cls=JSONEncoder))
    return done


def _mapping(panel: Panel) -> dashboard.ValueMap:
    options = {
        str(value): dashboard.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, text, color) in enumerate(panel.names)
    }
    return dashboard.ValueMap(options=options)


def _stat(built: Any, panel: Panel) -> Any:
    return (
        built.reduce_options(cb.ReduceDataOptions().calcs(["lastNotNull"]))
        .graph_mode(common.BigValueGraphMode.NONE)
        .color_mode(common.BigValueColorMode.VALUE)
        .text_mode(common.BigValueTextMode.NAME if "{{" in panel.queries[0].legend else common.BigValueTextMode.VALUE)
        .color_scheme(db.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
    )


def _lines(built: Any, panel: Panel) -> Any:
    stacked = panel.kind is Kind.STACK
    if panel.unit == SHARE:
        built = built.min(0).max(1)
    mode = common.StackingMode.NORMAL if stacked else common.StackingMode.NONE
    legend = cb.VizLegendOptions().show_legend(show_legend=True)
    return (
        built.fill_opacity(25 if stacked else 8)
        .line_width(1)
        .show_points(common.VisibilityMode.NEVER)
        .stacking(cb.StackingConfig().mode(mode).group("A"))
        .axis_soft_min(0)
        .color_scheme(db.FieldColor().mode(dashboard.FieldColorModeId.PALETTE_CLASSIC))
        .tooltip(cb.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .legend(
            legend.display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs(["lastNotNull", "max"])
        )
    )


def _states(built: Any, panel: Panel) -> Any:
    del panel
    return (
        built.merge_values(merge_values=True)
        .row_height(0.8)
        .fill_opacity(80)
        .line_width(0)
        .show_value(common.VisibilityMode.AUTO)
        .legend(
            cb.VizLegendOptions()
            .show_legend(show_legend=True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .calcs([])
        )
        .color_scheme(db.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS))
    )


def _table(built: Any, panel: Panel) -> Any:
    names = {f"Value #{chr(ord('A') + index)}": query.legend for index, query in enumerate(panel.queries)}
    merge = dashboard.DataTransformerConfig(id_val="merge", options={})
    organize = dashboard.DataTransformerConfig(
        id_val="organize", options={"excludeByName": {"Time": True}, "renameByName": names, "indexByName": {}}
    )
    built = built.transformations([merge, organize]).sort_by(
        [cb.TableSortByFieldState().display_name(panel.queries[0].legend).desc(desc=False)]
    )
    for name, unit in panel.units:
        built = built.override_by_name(name, [dashboard.DynamicConfigValue(id_val="unit", value=unit)])
    link = {
        "title": "This guest",
        "url": "/d/storaged-guest?var-vm=${__data.fields.vm}&var-host=${__data.fields.host}"
        "&var-datasource=${datasource}&${__url_time_range}",
    }
    return built.override_by_name("vm", [dashboard.DynamicConfigValue(id_val="links", value=[link])])


_SHAPES = {Kind.STAT: _stat, Kind.LINES: _lines, Kind.STACK: _lines, Kind.STATES: _states, Kind.TABLE: _table}
