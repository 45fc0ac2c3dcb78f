// One dashboard drawn with Grafana's own widgets, from answers that a real Prometheus gave (window.PREVIEW).
// Kept to what our dashboards use; a state timeline, which @grafana/ui does not have, is drawn as steps.
import React from 'react';
import { createRoot } from 'react-dom/client';
import { FieldType, ThemeContext, createTheme, dateTime, getDisplayProcessor, getFieldDisplayName } from '@grafana/data';
import 'uplot/dist/uPlot.min.css';
import { BigValue, GlobalStyles, PanelChrome, Table, TimeSeries } from '@grafana/ui';

const { board, answers, start, end } = window.PREVIEW;
const theme = createTheme({ colors: { mode: 'dark' } });
const timeRange = { from: dateTime(start * 1000), to: dateTime(end * 1000), raw: { from: 'now-15s', to: 'now' } };
const COLUMN = 60;
const UNIT = 38;

const named = (legend, labels) => legend.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? '');

function field(panel, name, values, index, extra = {}) {
  const { defaults, overrides } = panel.fieldConfig;
  const own = Object.fromEntries(
    overrides
      .filter((one) => one.matcher.id === 'byName' && one.matcher.options === name)
      .flatMap((one) => one.properties.map((property) => [property.id, property.value]))
  );
  const made = {
    name,
    type: FieldType.number,
    values,
    config: { ...defaults, ...own, displayName: name, custom: { ...defaults.custom, ...extra } },
    state: { seriesIndex: index, displayName: name },
  };
  made.display = getDisplayProcessor({ field: made, theme, timeZone: 'utc' });
  return made;
}

const time = (values) => {
  const made = { name: 'time', type: FieldType.time, values: values.map((one) => one * 1000), config: {} };
  made.display = getDisplayProcessor({ field: made, theme, timeZone: 'utc' });
  return made;
};

function lines(panel, extra) {
  let index = 0;
  return panel.targets.flatMap((target) =>
    answers[panel.id][target.refId].map((series) => ({
      refId: target.refId,
      length: series.values.length,
      fields: [
        time(series.values.map(([at]) => at)),
        field(panel, named(target.legendFormat, series.metric), series.values.map(([, value]) => Number(value)), index++, extra),
      ],
    }))
  );
}

function Lines({ panel, width, height, extra }) {
  const frames = lines(panel, extra);
  return (
    <TimeSeries
      frames={frames}
      structureRev={1}
      timeRange={timeRange}
      timeZone="utc"
      width={width}
      height={height}
      legend={panel.options?.legend ?? { showLegend: false, displayMode: 'list', placement: 'bottom', calcs: [] }}
    />
  );
}

function Stat({ panel, width, height }) {
  const target = panel.targets[0];
  const [series] = answers[panel.id][target.refId];
  const shown = field(panel, named(target.legendFormat, series.metric), [Number(series.values[0][1])], 0);
  return <BigValue value={shown.display(shown.values[0])} width={width} height={height} theme={theme} colorMode="value" graphMode="none" />;
}

function Grid({ panel, width, height }) {
  const rename = panel.transformations.find((one) => one.id === 'organize').options.renameByName;
  const key = (metric) => JSON.stringify(metric);
  const rows = new Map();
  panel.targets.forEach((target) =>
    answers[panel.id][target.refId].forEach((series) => {
      const row = rows.get(key(series.metric)) ?? { ...series.metric };
      row[rename[`Value #${target.refId}`]] = Number(series.values[0][1]);
      rows.set(key(series.metric), row);
    })
  );
  const all = [...rows.values()];
  const by = panel.options.sortBy?.[0];
  if (by) all.sort((one, other) => (one[by.displayName] - other[by.displayName]) * (by.desc ? -1 : 1));
  const fields = Object.keys(all[0]).map((name, index) => {
    const made = field(panel, name, all.map((row) => row[name]), index);
    if (typeof all[0][name] === 'string') {
      made.type = FieldType.string;
      made.display = (value) => ({ text: String(value), numeric: NaN });
    }
    made.getLinks = () => [];
    return made;
  });
  const data = { length: all.length, fields };
  fields.forEach((one) => getFieldDisplayName(one, data));
  return <Table data={data} width={width} height={height} />;
}

const SHOWN = {
  timeseries: (props) => <Lines {...props} />,
  'state-timeline': (props) => <Lines {...props} extra={{ drawStyle: 'line', lineInterpolation: 'stepAfter', lineWidth: 2, fillOpacity: 20 }} />,
  stat: (props) => <Stat {...props} />,
  table: (props) => <Grid {...props} />,
};

function Page() {
  const bottom = Math.max(...board.panels.map((panel) => panel.gridPos.y + panel.gridPos.h));
  return (
    <ThemeContext.Provider value={theme}>
      <GlobalStyles />
      <div style={{ position: 'relative', width: 24 * COLUMN, height: bottom * UNIT + 50, background: theme.colors.background.canvas }}>
        <h3 style={{ padding: 12, margin: 0, color: theme.colors.text.primary }}>{board.title}</h3>
        {board.panels.map((panel) => {
          const { x, y, w, h } = panel.gridPos;
          const box = { position: 'absolute', left: x * COLUMN + 4, top: y * UNIT + 50, width: w * COLUMN - 8, height: h * UNIT - 8 };
          if (panel.type === 'row') {
            return <div key={panel.id} style={{ ...box, color: theme.colors.text.secondary, padding: 6, fontWeight: 500 }}>{panel.title}</div>;
          }
          return (
            <div key={panel.id} style={box} data-panel={panel.title}>
              <PanelChrome title={panel.title} description={panel.description} width={box.width} height={box.height}>
                {(width, height) => SHOWN[panel.type]({ panel, width, height })}
              </PanelChrome>
            </div>
          );
        })}
      </div>
    </ThemeContext.Provider>
  );
}

class Boundary extends React.Component {
  state = {};
  static getDerivedStateFromError(error) {
    return { error };
  }
  render() {
    return this.state.error ? <pre id="failed">{String(this.state.error.stack)}</pre> : this.props.children;
  }
}

createRoot(document.getElementById('root')).render(<Boundary><Page /></Boundary>);
