"use strict";
(() => {
  // The buttons are named one by one because plotly's own set has one that uploads the figure.
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    showSendToCloud: false,
    plotlyServerURL: "",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };
  const holders = [...document.querySelectorAll(".plot")];

  // Plotly draws its buttons in SVG, where no keyboard reaches them; the page makes real ones.
  function addAxisButtons(holder, menu) {
    const row = holder.previousElementSibling;
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", "Horizontal axis");
    const buttons = menu.buttons.map((choice, index) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = choice.label;
      button.setAttribute("aria-pressed", String(index === 0));
      button.addEventListener("click", () => {
        buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
        Plotly.update(holder, ...choice.args);
      });
      return button;
    });
    row.replaceChildren(...buttons);
  }

  for (const holder of holders) {
    const figure = JSON.parse(document.getElementById(`${holder.id}-data`).textContent);
    const menus = figure.layout.updatemenus ?? [];
    delete figure.layout.updatemenus;
    if (menus.length) addAxisButtons(holder, menus[0]);
    Plotly.newPlot(holder, figure.data, figure.layout, config);
  }

  // Paper has one width and cannot unfold anything.
  const folded = () => [...document.querySelectorAll("details:not([open])")];
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = folded();
    unfolded.forEach((part) => (part.open = true));
    holders.forEach((holder) => Plotly.relayout(holder, { autosize: false, width: 660, height: 330 }));
  });
  addEventListener("afterprint", () => {
    unfolded.forEach((part) => (part.open = false));
    holders.forEach((holder) => Plotly.relayout(holder, { autosize: true, width: null, height: null }));
  });
})();
